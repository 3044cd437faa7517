"""Ed25519 signatures (RFC 8032, section 5.1), by `cryptography` if it is installed, else by the reference code below.

Both give the same result. Implementations disagree in some cases, which are checked first. S must be below the group's order L. The
key must be a canonical point that is not of small order. [S]B = R + [k]A is checked without the cofactor. The reference code takes
milliseconds and does not run in constant time. That is safe here: verification on the robot uses no secret, and signing runs on the
user's machine, where nobody else can measure the time.

Points are in extended coordinates (X, Y, Z, T), x = X/Z, y = Y/Z, xy = T/Z, of the curve -x^2 + y^2 = 1 + d x^2 y^2 over the
integers modulo P.
"""

from __future__ import annotations

import hashlib
from typing import Any, Optional, Tuple

__all__ = ["KEY_BYTES", "SIGNATURE_BYTES", "public_key", "sign", "verify"]

KEY_BYTES, SIGNATURE_BYTES = 32, 64

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
"""Order of the base point."""
_D = -121665 * pow(121666, -1, P) % P
_ROOT_OF_MINUS_1 = pow(2, (P - 1) // 4, P)

_Point = Tuple[int, int, int, int]
_NEUTRAL: _Point = (0, 1, 1, 0)


def verify(public_key_32: bytes, signature_64: bytes, message: bytes) -> bool:
    """Return whether the signature of the message is valid. Malformed input gives False, never an exception."""
    if len(public_key_32) != KEY_BYTES or len(signature_64) != SIGNATURE_BYTES:
        return False
    key = _decode(public_key_32)
    s = int.from_bytes(signature_64[32:], "little")
    if key is None or s >= L or _equal(_times(8, key), _NEUTRAL):
        return False
    library = _cryptography()
    if library is not None:
        return _verify_by(library, public_key_32, signature_64, message)
    k = _hash_int(signature_64[:32] + public_key_32 + message) % L
    negative = (P - key[0], key[1], key[2], P - key[3])
    return _encode(_add(_times(s, _BASE), _times(k, negative))) == signature_64[:32]


def public_key(seed_32: bytes) -> bytes:
    """Return the public key (32 bytes) that belongs to a private key (`seed_32`). A robot stores the public key and trusts it.

    Raises:
        ValueError: the seed is not 32 bytes.
    """
    return _encode(_times(_expand(seed_32)[0], _BASE))


def sign(seed_32: bytes, message: bytes) -> bytes:
    """Return the signature of a message, 64 bytes. The same seed and message always give the same bytes.

    Raises:
        ValueError: the seed is not 32 bytes.
    """
    a, prefix = _expand(seed_32)
    r = _hash_int(prefix + message) % L
    point = _encode(_times(r, _BASE))
    k = _hash_int(point + _encode(_times(a, _BASE)) + message) % L
    return point + ((r + k * a) % L).to_bytes(32, "little")


def _cryptography() -> Optional[Any]:
    """Return the module of `cryptography`, or None if it is absent or older than 2.6, which added Ed25519."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        return None
    return ed25519


def _verify_by(library: Any, public_key_32: bytes, signature_64: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        library.Ed25519PublicKey.from_public_bytes(public_key_32).verify(signature_64, message)
    except InvalidSignature:
        return False
    return True


def _expand(seed_32: bytes) -> Tuple[int, bytes]:
    """Return the secret scalar, and the prefix of the nonce, of a private key (section 5.1.5)."""
    if len(seed_32) != KEY_BYTES:
        raise ValueError(f"a private seed has {KEY_BYTES} bytes, got {len(seed_32)}")
    digest = hashlib.sha512(seed_32).digest()
    scalar = int.from_bytes(digest[:32], "little")
    return scalar & ((1 << 254) - 8) | (1 << 254), digest[32:]


def _hash_int(data: bytes) -> int:
    return int.from_bytes(hashlib.sha512(data).digest(), "little")


def _add(p: _Point, q: _Point) -> _Point:
    """Add two points (section 5.1.4). The formula is complete, so it also doubles a point."""
    a = (p[1] - p[0]) * (q[1] - q[0]) % P
    b = (p[1] + p[0]) * (q[1] + q[0]) % P
    c = 2 * p[3] * q[3] * _D % P
    d = 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def _times(scalar: int, point: _Point) -> _Point:
    total = _NEUTRAL
    while scalar:
        if scalar & 1:
            total = _add(total, point)
        point = _add(point, point)
        scalar >>= 1
    return total


def _equal(p: _Point, q: _Point) -> bool:
    return (p[0] * q[2] - q[0] * p[2]) % P == 0 and (p[1] * q[2] - q[1] * p[2]) % P == 0


def _encode(point: _Point) -> bytes:
    inverse = pow(point[2], -1, P)
    x, y = point[0] * inverse % P, point[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _decode(data: bytes) -> Optional[_Point]:
    """Decode a point (section 5.1.3). None: y >= P, no such point exists, or x is 0 and its sign bit is set."""
    y = int.from_bytes(data, "little")
    sign_of_x, y = y >> 255, y & ((1 << 255) - 1)
    if y >= P:
        return None
    square = (y * y - 1) * pow(_D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * _ROOT_OF_MINUS_1 % P
    if (x * x - square) % P or (x == 0 and sign_of_x):
        return None
    if x & 1 != sign_of_x:
        x = P - x
    return x, y, 1, x * y % P


def _base() -> _Point:
    """Return the base point: y = 4/5, x even."""
    point = _decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    assert point is not None
    return point


_BASE = _base()
