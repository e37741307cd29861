"""The blocks of a model, numbered in the names of what is in them: a pass can be watched at a block, or begin there."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["BLOCK", "ENTERING", "NUMBER", "Blocks", "Entered", "Stem", "block_of", "entering"]

NUMBER = re.compile(r"\.(\d+)\.")  # of a block, in the names of what is in it
ENTERING, BLOCK = "entering", "block"
"""In a batch, what `entering` makes: hidden states with which a pass begins, and at which block."""


def block_of(name: str) -> int | None:
    """The number in a name, which is its block's."""
    number = NUMBER.search(name)
    return int(number[1]) if number else None


class Stem(NamedTuple):
    """What of a model can be left out of a pass whose first blocks are not adapted.

    Attributes:
        blocks: a pass can begin at every block up to this one; 0 if only at the input.
        width: of the hidden states between blocks.
        dtype: of these.
    """

    blocks: int = 0
    width: int = 0
    dtype: torch.dtype = torch.float32


def entering(states: Sequence[Tensor], block: int, mask: Tensor) -> dict[str, Tensor]:
    """What a batch needs besides so that a pass begins at a block.

    Args:
        states: for each example the hidden states that enter the block, `[tokens, width]`.
        block: its number.
        mask: `[examples, tokens]`, zero for padding.
    """
    hidden = states[0].new_zeros(*mask.shape, states[0].shape[-1])
    hidden[mask.bool()] = torch.cat(list(states))
    return {ENTERING: hidden, BLOCK: torch.tensor(block)}


class Entered(Exception):
    """Ends a pass at a block."""


class Blocks:
    """The blocks of a model, which pass hidden states on from one to the next.

    Args:
        modules: from input to output.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()):
        """Nothing is watched yet."""
        self.modules = list(modules)
        self._besides: int | None = None  # what blocks return besides hidden states, in a tuple if this is a number

    @staticmethod
    def around(model: nn.Module, names: Sequence[str]) -> "Blocks":
        """The blocks with these layers in them: the members of the one module whose children are numbered in their names."""
        lists = {name[: match.start()] for name in names if (match := NUMBER.search(name))}
        return Blocks(list(model.get_submodule(lists.pop()).children()) if len(lists) == 1 else ())

    @contextlib.contextmanager
    def watched(self, upto: int | None = None) -> Iterator[dict[int, Tensor]]:
        """Note the hidden states that enter each block, and what blocks return; end the pass at a block, if one is named."""
        seen: dict[int, Tensor] = {}

        def enter(module: nn.Module, inputs: Any, named: Any) -> None:
            block = self.modules.index(module)
            seen[block] = inputs[0] if inputs else named["hidden_states"]
            if block == upto:
                raise Entered

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._besides = len(output) - 1 if isinstance(output, tuple) else None

        with contextlib.ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(leave))
            yield seen

    @contextlib.contextmanager
    def begun_at(self, block: int, hidden: Tensor) -> Iterator[None]:
        """Have passes begin at a block: those below hand on what they get, and it is given these hidden states."""

        def enter(module: nn.Module, inputs: Any, named: Any) -> Any:
            return ((hidden, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": hidden})

        below = [(module, module.__dict__.get("forward")) for module in self.modules[:block]]
        with self.modules[block].register_forward_pre_hook(enter, with_kwargs=True):
            for module, _ in below:
                module.forward = self._hand_on
            try:
                yield
            finally:
                for module, own in below:
                    if own is None:
                        del module.forward
                    else:
                        module.forward = own

    def checkpoint(self, drawing: Callable[[list[Tensor] | None], AbstractContextManager[list[Tensor]]]) -> None:
        """Have blocks keep their inputs alone for the backward pass, and compute the rest again there.

        Args:
            drawing: gives the states of what is drawn from in a block, or goes back to such states.
        """
        for module in self.modules:
            module.forward = partial(_again, drawing, module.forward)

    def _hand_on(self, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        return hidden_states if self._besides is None else (hidden_states, *[None] * self._besides)


def _again(
    drawing: Callable[[list[Tensor] | None], AbstractContextManager[list[Tensor]]],
    forward: Callable[..., Any],
    *inputs: Any,
    **named: Any,
) -> Any:
    """A block's pass; in the backward pass it is done again, with the same numbers drawn."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    noted: list[list[Tensor]] = []

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        with drawing(None) as states:
            noted.append(states)
            yield

    @contextlib.contextmanager
    def second() -> Iterator[None]:
        with drawing(noted[0]):
            yield

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (first(), second()), **named)
