"""Ed25519 against the vectors of RFC 8032, section 7.1, by the reference and by `cryptography` where it is installed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_compress.runtime.secure import ed25519

# TEST 1, 2, 3, 1024 and SHA(abc): secret key, public key, message, signature.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "f5e5767cf153319517630f226876b86c8160cc583bc013744c6bf255f5cc0ee5",
        "278117fc144c72340f67d0f2316e8386ceffbf2b2428c9c51fef7c597f1d426e",
        "08b8b2b733424243760fe426a4b54908632110a66c2f6591eabd3345e3e4eb98fa6e264bf09efe12ee50f8f54e9f77b1"
        "e355f6c50544e23fb1433ddf73be84d879de7c0046dc4996d9e773f4bc9efe5738829adb26c81b37c93a1b270b20329d"
        "658675fc6ea534e0810a4432826bf58c941efb65d57a338bbd2e26640f89ffbc1a858efcb8550ee3a5e1998bd177e93a"
        "7363c344fe6b199ee5d02e82d522c4feba15452f80288a821a579116ec6dad2b3b310da903401aa62100ab5d1a36553e"
        "06203b33890cc9b832f79ef80560ccb9a39ce767967ed628c6ad573cb116dbefefd75499da96bd68a8a97b928a8bbc10"
        "3b6621fcde2beca1231d206be6cd9ec7aff6f6c94fcd7204ed3455c68c83f4a41da4af2b74ef5c53f1d8ac70bdcb7ed1"
        "85ce81bd84359d44254d95629e9855a94a7c1958d1f8ada5d0532ed8a5aa3fb2d17ba70eb6248e594e1a2297acbbb39d"
        "502f1a8c6eb6f1ce22b3de1a1f40cc24554119a831a9aad6079cad88425de6bde1a9187ebb6092cf67bf2b13fd65f270"
        "88d78b7e883c8759d2c4f5c65adb7553878ad575f9fad878e80a0c9ba63bcbcc2732e69485bbc9c90bfbd62481d9089b"
        "eccf80cfe2df16a2cf65bd92dd597b0707e0917af48bbb75fed413d238f5555a7a569d80c3414a8d0859dc65a46128ba"
        "b27af87a71314f318c782b23ebfe808b82b0ce26401d2e22f04d83d1255dc51addd3b75a2b1ae0784504df543af8969b"
        "e3ea7082ff7fc9888c144da2af58429ec96031dbcad3dad9af0dcbaaaf268cb8fcffead94f3c7ca495e056a9b47acdb7"
        "51fb73e666c6c655ade8297297d07ad1ba5e43f1bca32301651339e22904cc8c42f58c30c04aafdb038dda0847dd988d"
        "cda6f3bfd15c4b4c4525004aa06eeff8ca61783aacec57fb3d1f92b0fe2fd1a85f6724517b65e614ad6808d6f6ee34df"
        "f7310fdc82aebfd904b01e1dc54b2927094b2db68d6f903b68401adebf5a7e08d78ff4ef5d63653a65040cf9bfd4aca7"
        "984a74d37145986780fc0b16ac451649de6188a7dbdf191f64b5fc5e2ab47b57f7f7276cd419c17a3ca8e1b939ae49e4"
        "88acba6b965610b5480109c8b17b80e1b7b750dfc7598d5d5011fd2dcc5600a32ef5b52a1ecc820e308aa342721aac09"
        "43bf6686b64b2579376504ccc493d97e6aed3fb0f9cd71a43dd497f01f17c0e2cb3797aa2a2f256656168e6c496afc5f"
        "b93246f6b1116398a346f1a641f3b041e989f7914f90cc2c7fff357876e506b50d334ba77c225bc307ba537152f3f161"
        "0e4eafe595f6d9d90d11faa933a15ef1369546868a7f3a45a96768d40fd9d03412c091c6315cf4fde7cb68606937380d"
        "b2eaaa707b4c4185c32eddcdd306705e4dc1ffc872eeee475a64dfac86aba41c0618983f8741c5ef68d3a101e8a3b8ca"
        "c60c905c15fc910840b94c00a0b9d0",
        "0aab4c900501b3e24d7cdf4663326a3a87df5e4843b2cbdb67cbf6e460fec350"
        "aa5371b1508f9f4528ecea23c436d94b5e8fcd4f681e30a6ac00a9704a188a03",
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
        "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
        "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
]
IDS = ["1", "2", "3", "1024", "sha-abc"]
SEED = bytes(range(32))


@pytest.fixture(params=["reference", "cryptography"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of verifying; the second where the library is installed."""
    if request.param == "cryptography":
        pytest.importorskip("cryptography")
    else:
        monkeypatch.setattr(ed25519, "_cryptography", lambda: None)
    return str(request.param)


@pytest.mark.parametrize(("seed", "key", "message", "signature"), VECTORS, ids=IDS)
def test_the_vectors_of_the_rfc(path: str, seed: str, key: str, message: str, signature: str) -> None:
    assert ed25519.public_key(bytes.fromhex(seed)).hex() == key
    assert ed25519.sign(bytes.fromhex(seed), bytes.fromhex(message)).hex() == signature
    assert ed25519.verify(bytes.fromhex(key), bytes.fromhex(signature), bytes.fromhex(message)) is True


def test_the_long_vector_is_whole() -> None:
    assert len(bytes.fromhex(VECTORS[3][2])) == 1023


def flipped(data: bytes, bit: int) -> bytes:
    bit %= 8 * len(data)
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


@given(seed=st.binary(min_size=32, max_size=32), message=st.binary(min_size=1, max_size=200), bit=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_flipped_bit_is_refused(seed: bytes, message: bytes, bit: int) -> None:
    key, signature = ed25519.public_key(seed), ed25519.sign(seed, message)
    assert ed25519.verify(key, signature, message)
    assert not ed25519.verify(flipped(key, bit), signature, message)
    assert not ed25519.verify(key, flipped(signature, bit), message)
    assert not ed25519.verify(key, signature, flipped(message, bit))


@pytest.mark.slow
def test_every_flipped_bit_of_a_signature_and_of_its_key_is_refused(path: str) -> None:
    key, signature = ed25519.public_key(SEED), ed25519.sign(SEED, b"manifest")
    assert not any(ed25519.verify(key, flipped(signature, bit), b"manifest") for bit in range(512))
    assert not any(ed25519.verify(flipped(key, bit), signature, b"manifest") for bit in range(256))


def test_a_signature_has_one_form(path: str) -> None:
    """S + L is the same scalar modulo L: RFC 8032, section 5.1.7, step 1, refuses it."""
    key, signature = ed25519.public_key(SEED), ed25519.sign(SEED, b"m")
    s = int.from_bytes(signature[32:], "little")
    for other in (s + ed25519.L, s + 2 * ed25519.L):
        assert not ed25519.verify(key, signature[:32] + other.to_bytes(32, "little"), b"m")


@pytest.mark.parametrize("y", [1, ed25519.P - 1, 0, ed25519.P, ed25519.P + 1], ids=["1", "-1", "0", "P", "P+1"])
@pytest.mark.parametrize("sign", [0, 1])
def test_a_key_of_small_order_or_not_canonical_is_refused(path: str, y: int, sign: int) -> None:
    """Under a key of small order, R = [S]B passes for every message whose hash is a multiple of that order."""
    key = (y | sign << 255).to_bytes(32, "little")
    forged = ed25519._encode(ed25519._times(5, ed25519._BASE)) + (5).to_bytes(32, "little")
    assert not any(ed25519.verify(key, forged, bytes([i])) for i in range(8))


def test_a_key_that_is_no_point_is_refused(path: str) -> None:
    signature = ed25519.sign(SEED, b"m")
    off_the_curve = [y for y in range(2, 40) if ed25519._decode(y.to_bytes(32, "little")) is None]
    assert off_the_curve, "about half of all y"
    assert not any(ed25519.verify(y.to_bytes(32, "little"), signature, b"m") for y in off_the_curve)


@pytest.mark.parametrize("key_bytes", [0, 31, 33])
@pytest.mark.parametrize("signature_bytes", [0, 63, 65])
def test_wrong_lengths_are_refused(path: str, key_bytes: int, signature_bytes: int) -> None:
    key, signature = ed25519.public_key(SEED), ed25519.sign(SEED, b"m")
    assert not ed25519.verify((key * 2)[:key_bytes], signature, b"m")
    assert not ed25519.verify(key, (signature * 2)[:signature_bytes], b"m")
    with pytest.raises(ValueError, match="32 bytes"):
        ed25519.sign((SEED * 2)[:key_bytes], b"m")


def test_the_neutral_point_has_its_orders() -> None:
    assert ed25519._equal(ed25519._times(ed25519.L, ed25519._BASE), ed25519._NEUTRAL)
    assert not ed25519._equal(ed25519._times(8, ed25519._BASE), ed25519._NEUTRAL)
