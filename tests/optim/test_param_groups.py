"""Parameter groups: the same for dense and for Grass training."""

from optim.param_groups import parameter_groups
from tests.optim.test_grass import grass_of, tiny_llama


def test_parameter_groups_name_the_same_layers_in_dense_and_grass_training():
    def names(model, group):
        groups = {g["name"]: [n for n, _ in g["params"]] for g in parameter_groups(model, lr=1e-3, linear_lr=1e-4)}
        return {name.rsplit(".", 1)[0] for name in groups[group]}

    dense, model = tiny_llama(), grass_of(4)[0]
    assert len(names(dense, "linears")) == 14
    for group in ("linears", "embeddings", "norms"):
        assert names(dense, group) == names(model, group)
    assert names(dense, "embeddings") == {"embed_tokens", "lm_head"}
