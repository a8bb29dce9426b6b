"""Which deltas act on which row of a batch of padded rows, where rows differ (`modes.by_row`)."""

from torch import Tensor

from graftlm.errors import TargetError
from graftlm.model.routes import Row


class Switch:
    """One for each model, known to all its hosts: which deltas act on which row of a batch, where rows differ."""

    def __init__(self) -> None:
        self.rows: list[Row] | None = None
        self.passes: list[tuple[int, int] | None] = []
        """(rows, tokens) of the batch of each pass that is going on, the outermost first; None where it is unknown."""

    def begin(self, inputs: Tensor | None) -> None:
        """A pass begins over ids [rows, tokens] or embeddings [rows, tokens, d]."""
        self.passes.append(None if inputs is None else (inputs.shape[0], inputs.shape[1]))
        if inputs is not None:
            self.each(len(inputs))

    def end(self) -> None:
        if self.passes:
            self.passes.pop()

    def each(self, count: int) -> int:
        """How many of `count` rows, or of their tokens, lie one behind the other for each row that was named.

        Generation repeats a row for its beams and for several answers. Some blocks lay the tokens of all rows end to
        end. Either way, what belongs to a row stays together.
        """
        assert self.rows is not None
        if count % len(self.rows):
            raise TargetError(
                f"deltas were given for {len(self.rows)} rows, the batch has {count}", code="row-count-mismatch"
            )
        return count // len(self.rows)

    def for_each_row(self, x: Tensor) -> Tensor:
        """x, repeated where the model makes one for all rows, as it does of positions [1, tokens]."""
        rows = self.passes[-1][0] if self.passes and self.passes[-1] else 1
        return x.expand(rows, *x.shape[1:]) if len(x) == 1 and not x.is_floating_point() else x

    def check(self, x: Tensor, where: str) -> None:
        """Refuse an x whose rows cannot be told from its shape: [rows, ..] or, laid end to end, [rows * tokens, d]."""
        if not self.passes or self.passes[-1] is None:
            return
        rows, tokens = self.passes[-1]
        laid_out = x.dim() == 2 and x.is_floating_point()
        if len(x) != rows and not (laid_out and len(x) == rows * tokens):
            raise TargetError(
                f"{where} gets {len(x)} {'vectors' if laid_out else 'rows'} of a batch of {rows} rows of {tokens} "
                "tokens, so it cannot be told which belong to which row (a router may have chosen them). Run the rows "
                "one by one, or give them all the same deltas",
                code="rows-not-separable",
            )
