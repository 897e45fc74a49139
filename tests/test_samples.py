"""Nobody is handed an empty array of draws: every distribution refuses to make less than one."""

import ast
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import amortlib
from amortlib.gaussian import AbstractDistribution, Gaussian, GaussMarkov
from amortlib.heads import FlowHead, MixtureHead
from amortlib.heads.score import ScoreHead

KEY = jax.random.key(0)
PRIOR = Gaussian(jnp.zeros(2), jnp.eye(2))
SMALL = {"layers": 1, "condition": 2, "width": 2, "knots": 2, "points": 4, "climbs": 1}

MAKERS: dict[str, Callable[[], AbstractDistribution]] = {
    "Gaussian": lambda: PRIOR,
    "GaussMarkov": lambda: GaussMarkov(jnp.zeros(2), jnp.ones((2, 1, 1)), jnp.full((1, 1, 1), 0.3)),
    "GaussianMixture": lambda: MixtureHead(3, 2, key=KEY)(jnp.ones(3)),
    "FlowDistribution": lambda: FlowHead(3, PRIOR, dim=2, key=KEY, **SMALL)(jnp.ones(3)),
    "ScoreDistribution": lambda: ScoreHead(3, PRIOR, key=KEY, width=2, depth=1)(jnp.ones(3)),
}


@pytest.mark.parametrize("n", [0, -1])
@pytest.mark.parametrize("kind", MAKERS)
def test_less_than_one_draw_is_refused(kind: str, n: int) -> None:
    density = MAKERS[kind]()
    assert type(density).__name__ == kind
    with pytest.raises(ValueError, match=f"expected at least one sample, got n={n}"):
        density.sample(n, key=KEY)


def test_every_distribution_of_the_package_says_so() -> None:
    """A new one that only hands out an empty array is found by its source."""
    checked = set()
    for path in Path(amortlib.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            if "AbstractDistribution" not in {ast.unparse(base) for base in node.bases}:
                continue
            (sample,) = (
                f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "sample"
            )
            assert "at least one sample" in ast.unparse(sample), f"{path.name}: {node.name}"
            checked.add(node.name)
    assert checked >= set(MAKERS)
