"""Tools of the house: building the book, regenerating the pins, finding a browser."""
