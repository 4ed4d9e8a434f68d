"""Why something is not faster here, in a plain sentence. Pure functions of measured numbers."""

from __future__ import annotations

from dataclasses import dataclass

FASTER = 1.02
"""Speed from which on a difference is more than the noise of medians."""
SMALL_LIMIT = 1.15
CALLS_SHARE = 0.5
FAR_FROM_ROOFLINE = 0.5


@dataclass(frozen=True)
class Evidence:
    """What is known about one FFN at one number of tokens, beside its dense one.

    Attributes:
        tokens: in the forward.
        speed: times the dense FFN's; below 1 is slower.
        bound: ``memory`` or ``compute``: what limits the compressed FFN at best.
        roofline: share of what the machine could do at best.
        bytes_ratio: bytes that move, as a share of the dense FFN's.
        macs_ratio: multiply-accumulates done, as a share of the dense FFN's.
        operations: calls of a forward.
        dense_operations: the same of the dense FFN.
        calls_share: share of the time that so many calls take at least.
        decoded: low-bit weights are decoded to floats in every forward.
        kept: low-bit weights are multiplied by as floats that were kept.
        masked: a selector leaves work out by masks.
    """

    tokens: int
    speed: float
    bound: str
    roofline: float
    bytes_ratio: float
    macs_ratio: float
    operations: int
    dense_operations: int
    calls_share: float
    decoded: bool = False
    kept: bool = False
    masked: bool = False


def ffn_verdict(evidence: Evidence) -> str | None:
    """The sentence for an FFN; ``None`` if it is faster."""
    if evidence.speed >= FASTER:
        return None
    return f"{_how(evidence.speed)} at {_tokens(evidence.tokens)}: {_why_ffn(evidence)}"


def _why_ffn(evidence: Evidence) -> str:
    if evidence.decoded:
        return (
            "the low-bit weights are decoded to floats in every forward before a dense product (dequantisation path; "
            "no low-bit kernel serves this storage, device and number of tokens)"
        )
    if evidence.kept:
        return (
            "the low-bit weights were decoded once and are kept and multiplied by as floats: the same bytes and "
            "products as a dense FFN (no low-bit kernel is faster for this storage, device and number of tokens)"
        )
    if evidence.calls_share >= CALLS_SHARE and evidence.operations > evidence.dense_operations:
        return (
            f"bound by launches: {evidence.operations} operations against {evidence.dense_operations} of the dense "
            f"FFN, and starting them takes {evidence.calls_share:.0%} of the time"
        )
    if evidence.masked:
        return (
            "neurons are left out by masks: no kernel skips their work on this device at so many tokens, or too few "
            "neurons are left out"
        )
    if evidence.bound == "compute" and evidence.macs_ratio > 0.95:
        return (
            "compute-bound: the dense FFN is limited by multiply-accumulates here, and the compressed one does as "
            "many; fewer bytes do not help"
        )
    if evidence.bytes_ratio > 0.95:
        return "memory-bound, and as many bytes move as before"
    if evidence.roofline < FAR_FROM_ROOFLINE:
        return (
            f"{evidence.bound}-bound at best, but its kernels reach only {evidence.roofline:.0%} of the roofline "
            f"({evidence.operations} operations against {evidence.dense_operations})"
        )
    return f"{evidence.bound}-bound, and the saving is too small to show"


def model_verdict(phase: str, speed: float, limit: float, ffn_speed: float | None) -> str | None:
    """The sentence for a whole model; ``None`` if it is faster.

    Args:
        phase: what was timed, in words.
        speed: times the dense model's.
        limit: the speed with FFNs that take no time (Amdahl).
        ffn_speed: of the FFNs alone at about as many tokens, if it was measured.
    """
    if speed >= FASTER:
        return None
    reasons = []
    if ffn_speed is not None and ffn_speed < FASTER:
        reasons.append(f"its FFNs are not faster themselves (x{ffn_speed:.2f}, see their lines)")
    if limit < SMALL_LIMIT:
        limit = max(limit, 1.0)  # the noise of a machine under load
        share = 1 - 1 / limit
        reasons.append(f"FFNs are only {share:.0%} of the dense model's time, so none can give more than x{limit:.2f}")
    if not reasons:
        alone = "" if ffn_speed is None else f", x{ffn_speed:.2f} alone"
        reasons.append(
            f"the rest of the model hides what its FFNs save{alone} (the most they could give: x{limit:.2f})"
        )
    return f"{_how(speed)} in {phase}: {'; '.join(reasons)}"


def _how(speed: float) -> str:
    return f"NOT faster (x{speed:.2f})" if speed > 1 / FASTER else f"SLOWER (x{speed:.2f})"


def _tokens(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens:,} tokens"
