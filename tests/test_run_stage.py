"""How a stage ends when it cannot do its work."""

from collections.abc import Callable

import pytest

from infini_retrofit.pipeline.guard import run_stage


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\nlines"),
        FileNotFoundError("two lines"),
        ConnectionError("two lines"),
        OSError("two lines"),
        FloatingPointError("two lines"),
    ],
)
def test_a_user_s_mistake_ends_in_one_sentence(error):
    with pytest.raises(SystemExit) as caught:
        run_stage(raiser(error))
    assert caught.value.code == "error: two lines"


def test_our_own_mistake_keeps_its_traceback():
    with pytest.raises(AssertionError):
        run_stage(raiser(AssertionError()))


def raiser(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main
