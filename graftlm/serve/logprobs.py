"""Log-probabilities in the forms of OpenAI's chat and of its completions."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from graftlm.generation.logprobs import TokenLogprob

LEAST = -9999.0
"""What OpenAI writes for a probability of 0, as JSON has no infinity."""


@lru_cache(maxsize=1)
def _byte_of() -> Mapping[str, int]:
    """The characters that byte-level tokenizers write bytes as -> the bytes (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenTexts:
    """The bytes of each token by itself, and its text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): token.content for i, token in tokenizer.added_tokens_decoder.items()}
        decoder = tokenizer.backend_tokenizer.decoder
        self._byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self.bytes_of: Callable[[int], bytes] = lru_cache(maxsize=65536)(self._bytes_of)

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # of a padded vocabulary
            return b""
        if self._byte_level:
            return bytes(_byte_of()[character] for character in piece if character in _byte_of())
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """The text; bytes that are no whole character as U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        """The text, or `bytes:\\xe2` where it is no whole character, as OpenAI's completions write it."""
        try:
            return self.bytes_of(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(token))

    def chat(self, tokens: Sequence[int], found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """choices[].logprobs.content of chat completions."""
        return [
            self._entry(token, each.logprob) | {"top_logprobs": [self._entry(*pair) for pair in each.likeliest]}
            for token, each in zip(tokens, found, strict=True)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        own = self.bytes_of(token)
        return {"token": own.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(own)}

    def completion(
        self, tokens: Sequence[int], found: Sequence[TokenLogprob | None], offset: int = 0
    ) -> dict[str, list[Any]]:
        """choices[].logprobs of completions; `offset`: characters of the text before the first token."""
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(self.text_of(token))
        return {
            "tokens": [self.name_of(token) for token in tokens],
            "token_logprobs": [None if each is None else max(each.logprob, LEAST) for each in found],
            "top_logprobs": [None if each is None else self._likeliest(each) for each in found],
            "text_offset": offsets,
        }

    def _likeliest(self, found: TokenLogprob) -> dict[str, float]:
        """Text -> log-probability; of two tokens with one text the likelier one."""
        return {self.name_of(token): max(logprob, LEAST) for token, logprob in reversed(found.likeliest)}
