# SPDX-License-Identifier: Apache-2.0
"""Names of kinds."""

import pytest

from svsk_kernels.errors import SvskError
from svsk_vllm.kv_cache import KEY_KINDS, VALUE_KINDS, KvKinds


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("kpc32", "kpc32:q4_1"),
        ("kpc32:raw", "kpc32:raw"),
        ("q4_0", "q4_0:q4_0"),
        ("int4", "int4:int4"),
        ("raw:q8_0-rot", "raw:q8_0-rot"),
    ],
)
def test_kinds(text: str, kinds: str) -> None:
    assert str(KvKinds.parse(text)) == kinds
    assert KvKinds.parse(kinds) == KvKinds.parse(text)


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_every_kind_of_values_is_one_of_keys(kind: str) -> None:
    assert KvKinds.parse(kind) == KvKinds(kind, kind)
    assert kind in KEY_KINDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8", "--kv fp8: 'fp8' is no kind of keys, expected one of raw, q8_0, q4_0, q4_1, int4,"),
        ("q4_0:kpc32", "'kpc32' is no kind of values, expected one of raw"),
        ("kpc32:", "'' is no kind of values"),
        ("", "'' is no kind of keys"),
        ("q4_0:q4_0:q4_0", "'q4_0:q4_0' is no kind of values"),
    ],
)
def test_other_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(SvskError) as caught:
        KvKinds.parse(text)
    assert message in str(caught.value)
