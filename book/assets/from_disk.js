// A search shows a few words of each page that it finds, which it fetches. A browser refuses that to
// pages that are opened from disk, and says so for each of them: there the titles have to do.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
