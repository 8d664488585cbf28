"""Keys that start white."""

import torch

from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.model.running import run_folded
from infini_retrofit.training.whitening import whiten_keys
from tests.reference import MODEL_FORMS, retrofitted

FORM = next(form for form in MODEL_FORMS if form.get("memory_value") == "embedding")
LENGTH = 5


def given(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a memory's layer makes of documents: queries, keys and values."""
    module, found = infini_modules(model)[1], {}
    for name in ("q_proj", "k_proj", "v_proj"):
        hook = lambda _, args, out, name=name: found.update({name: out.flatten(0, 1)})  # noqa: E731
        getattr(module, name).register_forward_hook(hook)
    run_folded(model, ids, LENGTH)
    return found


@torch.no_grad()
def test_white_keys_have_no_mean_and_no_correlation():
    model = retrofitted(**FORM)
    ids = torch.randint(0, model.config.vocab_size, (8, 20 * LENGTH))
    whiten_keys(model, ids, LENGTH, torch.float32)
    found = given(model, ids)
    assert torch.equal(found["q_proj"], found["k_proj"])
    assert found["k_proj"].mean(dim=0).abs().max() < 1e-4
    assert found["v_proj"].mean(dim=0).abs().max() < 1e-4
    covariance = found["k_proj"].T.cov()
    variance = covariance.diagonal()
    assert (covariance - variance.diag()).abs().max() < 1e-3
    # All but directions of next to no variance, which are the last.
    assert (variance[:-4] - 1).abs().max() < 0.1
    assert (variance <= 1.001).all()


@torch.no_grad()
def test_keys_of_other_forms_stay():
    model = retrofitted(**FORM | {"memory_key": "own"})
    before = {name: x.clone() for name, x in model.state_dict().items()}
    whiten_keys(model, torch.randint(0, 50, (2, 20)), LENGTH, torch.float32)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
