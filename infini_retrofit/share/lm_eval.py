"""A retrofitted model for lm-evaluation-harness, which streams documents of any length.

`python -m infini_retrofit.share.lm_eval` is the command `lm_eval` with one more model:
    --model infini --model_args retrofit=FOLDER,base=FOLDER,dtype=TYPE
Defaults: retrofit=models/finetuned, base=models/base, dtype=auto. Other types: bfloat16, float32.
This project's tasks: --include_path eval_tasks --tasks article_perplexity,article_last_word

Every layer sees one segment at a time (protocol `segment`). The memory and the local context cross.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from infini_retrofit.layer.state import State
from infini_retrofit.model.base import load_tokenizer
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline.beginnings import first_tokens
from infini_retrofit.pipeline.device import pick_device, pick_dtype
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.scoring.losses import token_nlls
from infini_retrofit.scoring.score import StatesAndLabels, next_tokens

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:  # nothing here is of use without the harness
    sys.exit(f"error: {error.name} is missing: run `pip install lm-eval==0.4.13`")

SEGMENTS_PER_PIECE = 16  # that go through the model at once: more take more memory


@register_model("infini")
class InfiniLM(TemplateLM):
    """A retrofitted model under the protocol `segment`.

    The first token of a text is not scored: BOS where the tokenizer puts one before a text. The
    model scores one text at a time, whatever the batch size.
    """

    def __init__(
        self,
        retrofit: str = "models/finetuned",
        base: str = "models/base",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a retrofit and its base; the batch sizes are ignored."""
        super().__init__()
        # The harness names a GPU even where there is none.
        is_there = device and (torch.cuda.is_available() or not device.startswith("cuda"))
        self._device = torch.device(device) if is_there else pick_device()
        types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        types["auto"] = pick_dtype(self._device)  # bfloat16 where the device multiplies it
        if dtype not in types:
            raise ValueError(f"dtype must be one of {', '.join(sorted(types))}, got {dtype}")
        model, infini = load_retrofit(Path(base), Path(retrofit), types[dtype])
        self.model = model.to(self._device)
        self.segment_length = infini.segment_length
        self.tokenizer = load_tokenizer(Path(base))
        self.first = first_tokens(self.tokenizer.backend_tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context: BOS where the tokenizer has one."""
        return self.first[0] if self.first else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool = True, **_: object) -> list[int]:
        """Encode a text as everywhere in this project: behind `first_tokens`."""
        first = self.first if add_special_tokens else []
        return first + self.tokenizer.encode(string, add_special_tokens=False)

    @torch.inference_mode()
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, without its first token."""
        scores = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0])
            pieces = self._last_tokens(ids, len(ids) - 1)
            scores.append(sum((self._log_likelihood(*piece) for piece in pieces), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, scores[-1])
        return scores

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it."""
        answers = []
        for texts, context, continuation in tqdm(requests, desc="texts", disable=disable_tqdm):
            score, is_greedy = 0.0, True
            pieces = self._last_tokens(context + continuation, len(continuation))
            for hidden_states, labels in pieces:
                score += self._log_likelihood(hidden_states, labels)
                if is_greedy:
                    logits = self.model.get_output_embeddings()(hidden_states)
                    is_greedy = bool((logits.argmax(-1) == labels).all())
            answers.append((score, is_greedy))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refuse to generate: the harness's own model `hf` does that with an exported folder."""
        raise ValueError(
            "output_type of a task must be loglikelihood, loglikelihood_rolling or multiple_choice "
            "for --model infini, got generate_until: export the retrofit and use --model hf"
        )

    def _last_tokens(self, ids: list[int], number: int) -> Iterator[StatesAndLabels]:
        """Yield the last tokens as labels, with the hidden states that predict them.

        The last hidden state of a piece predicts the first token of the next.
        """
        state, last = State(), None
        segment_length, num_before = self.segment_length, len(ids) - 1 - number
        for begin in range(0, len(ids), SEGMENTS_PER_PIECE * segment_length):
            end = begin + SEGMENTS_PER_PIECE * segment_length
            piece = torch.tensor(ids[begin:end], device=self._device)
            # Padding fills the last segment, after every scored token.
            padded = F.pad(piece, (0, -len(piece) % segment_length))[None]
            hidden_states = run_folded(
                self.model, padded, segment_length, state=state, first_position=begin
            )[0, : len(piece)]
            if last is not None:
                hidden_states = torch.cat([last[0], hidden_states])
                piece = torch.cat([last[1], piece])
            state, last = state.next(), (hidden_states[-1:], piece[-1:])
            hidden_states, labels = next_tokens(piece, hidden_states)
            skipped = max(0, num_before - max(0, begin - 1))
            yield hidden_states[skipped:], labels[skipped:]

    def _log_likelihood(self, hidden_states: Tensor, labels: Tensor) -> float:
        head = self.model.get_output_embeddings()
        nlls = token_nlls(hidden_states, head.weight, labels, head.bias)
        return -nlls.double().sum().item()


def main() -> None:
    """Run the harness's own command line; its help begins with what this project adds."""
    if len(sys.argv) == 1 or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    cli_evaluate()


def command() -> None:
    """Run the command `infini-eval`."""
    run_stage(main)


if __name__ == "__main__":
    command()
