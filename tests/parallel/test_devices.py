"""What users write for devices."""

import pytest

from ernie_lab.parallel.devices import devices_in_words, read_devices


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("80GB", (80 * 10**9,)),
        ("8x80GB", (80 * 10**9,) * 8),
        ("2 x 24 GiB", (24 * 2**30,) * 2),
        ("4×80gb, 2*24gib", (80 * 10**9,) * 4 + (24 * 2**30,) * 2),
        ("1.5TB", (15 * 10**11,)),
    ],
)
def test_groups_of_devices(text: str, sizes: tuple[int, ...]) -> None:
    assert read_devices(text) == sizes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no device; write 80GB, 8x80GB"),
        (",", "names no device"),
        ("80", r"80 of what\? write 80GB \(10\^9 bytes\) or 80GiB"),
        ("8x80", "8x80 of what"),
        ("80GBx8", "the number of devices comes first: 8x80GB"),
        ("80G", "no unit 'G'; there are MB, GB"),
        ("8xA100", "expected memory and not a name"),
        ("8xGB", "expected memory"),
        ("4x80GB,", r"group ''"),
        ("4x80GB,H100", "group 'H100': expected memory"),
        ("0x80GB", "0 devices"),
        ("0GB", "1 devices of 0 bytes"),
        ("99999x80GB", "99999 devices"),
        ("-8GB", "expected memory"),
    ],
)
def test_slips_are_named(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_devices(text)


def test_in_words() -> None:
    assert (
        devices_in_words(read_devices("4x80GB,24GB,2x80GB"))
        == "4 x 80.0 GB + 24.0 GB + 2 x 80.0 GB"
    )
