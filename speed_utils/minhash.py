"""MinHash over word n-grams of millions of texts: compiled, and equal to datasketch's.

Texts come as Arrow string arrays and leave as numpy arrays; nothing is a Python object in between.
The compiled loops start no threads and release Python's lock: callers run blocks in threads.

    texts = pa.array(["one text", "another"])
    signatures(texts)                      # (2, 128) uint32, as datasketch.MinHash computes them
    shingle_sets(texts)                    # sorted 64-bit hashes of each text's shingles

A word is a run of bytes between ASCII white space, ASCII letters in lower case. A shingle is five
words in a row; a shorter text is one shingle.

Paper: MinHash is named in Section 4.1, its parameters are not published.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import pyarrow as pa

from speed_utils.dedup import N_PERMUTATIONS, SHINGLE_WORDS

MINHASH_SEED = 1
_MIX = np.uint64(0xFF51AFD7ED558CCD)  # two odd numbers of MurmurHash3's finalizer
_OTHER_MIX = np.uint64(0xC4CEB9FE1A85EC53)
_START = np.uint64(0x9E3779B97F4A7C15)
_BYTES = 0x0101010101010101  # times a byte: that byte in all eight places of a number
_HIGH, _LOW = np.uint64(0x80 * _BYTES), np.uint64(0x7F * _BYTES)
_BLANKS = np.uint64(32 * _BYTES)
# Added to bytes below 128, sets the high bit of those that are at least 9, 14, 65, 91 and 1.
_FROM_TAB, _FROM_SO, _FROM_A, _AFTER_Z, _FROM_1 = (
    np.uint64((128 - least) * _BYTES) for least in (9, 14, 65, 91, 1)
)
_PLACES = np.uint64(0x0001020304050607)  # its highest byte, shifted left by 8 k bits, is k


def signatures(
    texts: pa.Array, n_permutations: int = N_PERMUTATIONS, n_words: int = SHINGLE_WORDS
) -> np.ndarray:
    """MinHash signatures.

    Returns:
        Shape (texts, n_permutations), uint32: what ``datasketch.MinHash.update_batch`` gives with
        the low 32 bits of ``shingle_hash`` as its hash function and the same seed.
    """
    return _signed(texts, np.zeros(len(texts), np.uint64), n_permutations, n_words)[0]


def permutations(n_permutations: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and summands of datasketch's permutations, uint32 each."""
    from datasketch import MinHash

    factors, summands = MinHash(num_perm=n_permutations, seed=MINHASH_SEED).permutations
    return factors, summands


def band_hashes(
    texts: pa.Array, salt: np.ndarray, *, n_permutations: int, n_bands: int, n_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the signature's bands, and a fingerprint of the whole text.

    Args:
        texts: string array without nulls.
        salt: Shape (texts,), integers; texts of different salt never share a hash.
        n_permutations: of the signature; at least n_bands * n_rows.
        n_bands: bands of n_rows values each.
        n_rows: values in a band.

    Returns:
        Bands, shape (n_bands, texts), uint64; fingerprints, shape (texts, 2), uint64: equal
        for texts of the same words and salt.
    """
    salt = salt.astype(np.uint64)
    signed, prints = _signed(texts, salt, n_permutations, SHINGLE_WORDS)
    bands = np.empty((n_bands, len(texts)), np.uint64)
    _band(signed, salt, n_rows, bands)
    return bands, prints


def shingle_sets(texts: pa.Array, n_words: int = SHINGLE_WORDS) -> tuple[np.ndarray, np.ndarray]:
    """Each text's set of shingles.

    Returns:
        Hashes, uint64, ascending and distinct within a text; offsets, shape (texts + 1,), int64:
        text ``k`` has ``hashes[offsets[k]:offsets[k + 1]]``.
    """
    data, offsets = _buffers(texts)
    lengths = np.maximum(count_words(texts) - n_words + 1, 1)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    hashes = np.empty(bounds[-1], np.uint64)
    _fill_shingles(data, offsets, n_words, bounds, hashes, lengths)
    return _close_gaps(hashes, bounds, lengths)


def count_words(texts: pa.Array) -> np.ndarray:
    """Words of each text; null counts as none. Shape (texts,), int64."""
    data, offsets = _buffers(texts.fill_null(""))
    counts = np.empty(len(texts), np.int64)
    _count_words(data, offsets, counts)
    return counts


def jaccards(
    hashes: np.ndarray, offsets: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Exact Jaccard similarity of pairs of shingle sets.

    Args:
        hashes: as shingle_sets gives them.
        offsets: likewise.
        left: Shape (pairs,), index of each pair's first text.
        right: Shape (pairs,), of its second.

    Returns:
        Shape (pairs,), float64, 0 to 1.
    """
    out = np.empty(len(left), np.float64)
    _jaccards(hashes, offsets, left, right, out)
    return out


def shingle_hash(shingle: bytes) -> int:
    """The 64-bit hash of a shingle, its words joined by blanks; permutations take the low half."""
    hashed = _START
    with np.errstate(over="ignore"):
        for word in shingle.lower().split():
            value = _START
            for place in range(0, len(word), 8):
                eight = int.from_bytes(word[place : place + 8], "little")
                value = (value ^ np.uint64(eight)) * _MIX
                value ^= value >> np.uint64(32)
            hashed = (hashed ^ (value + np.uint64(len(word)))) * _MIX
            hashed ^= hashed >> np.uint64(32)
    return int(hashed)


def _signed(
    texts: pa.Array, salt: np.ndarray, n_permutations: int, n_words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Signatures and fingerprints, from one pass over the words."""
    signed = np.empty((len(texts), n_permutations), np.uint32)
    prints = np.empty((len(texts), 2), np.uint64)
    _sign(*_buffers(texts), salt, *permutations(n_permutations), n_words, signed, prints)
    return signed, prints


def _buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and offsets of a string array."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    wide = pa.types.is_large_string(texts.type)
    _, offsets, data = texts.buffers()
    width = np.int64 if wide else np.int32
    numbers = np.frombuffer(offsets, width) if offsets else np.zeros(1, width)
    numbers = numbers[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    return np.frombuffer(data or b"\0", np.uint8), numbers


@nb.njit(inline="always")
def _is_space(byte: int) -> bool:
    return (byte == 32) | ((byte >= 9) & (byte <= 13))


@nb.njit(inline="always")
def _eight(data, place):
    """Eight bytes as a number, the first one lowest: one load, once compiled."""
    return (
        np.uint64(data[place])
        | np.uint64(data[place + np.uint64(1)]) << np.uint64(8)
        | np.uint64(data[place + np.uint64(2)]) << np.uint64(16)
        | np.uint64(data[place + np.uint64(3)]) << np.uint64(24)
        | np.uint64(data[place + np.uint64(4)]) << np.uint64(32)
        | np.uint64(data[place + np.uint64(5)]) << np.uint64(40)
        | np.uint64(data[place + np.uint64(6)]) << np.uint64(48)
        | np.uint64(data[place + np.uint64(7)]) << np.uint64(56)
    )


@nb.njit(inline="always")
def _last_few(data, place, stop):
    """The last bytes of a text, and blanks after them, as a number."""
    value, shift = _BLANKS, np.uint64(0)
    while place < stop:
        value ^= (np.uint64(data[place]) ^ np.uint64(32)) << shift
        place, shift = place + np.uint64(1), shift + np.uint64(8)
    return value


@nb.njit(cache=True, nogil=True)
def _words(data, start, stop, out):
    """Hash the words of one text into ``out``, eight bytes at a time; return how many there are.

    After each white space the eight bytes begin anew, so that a word's hash does not depend on its
    place; shingle_hash says what is computed. A byte below 128 that is white space or a capital is
    marked by its high bit. ``place`` may end one past ``stop``.
    """
    place, stop = np.uint64(start), np.uint64(stop)
    count, value, length = 0, _START, np.uint64(0)
    while place < stop:
        is_whole = place + np.uint64(8) <= stop
        eight = _eight(data, place) if is_whole else _last_few(data, place, stop)
        low, is_ascii = eight & _LOW, ~eight & _HIGH
        is_blank = ~((low ^ _BLANKS) + _FROM_1)
        is_space = (is_blank | ((low + _FROM_TAB) & ~(low + _FROM_SO))) & is_ascii
        eight |= ((low + _FROM_A) & ~(low + _AFTER_Z) & is_ascii) >> np.uint64(2)  # lower case
        if is_space:
            first = (is_space & (~is_space + np.uint64(1))) >> np.uint64(7)  # lowest marked byte
            n_before = (first * _PLACES) >> np.uint64(56)  # its index
            eight &= first - np.uint64(1)  # the bytes before it
            place += n_before + np.uint64(1)
        else:
            n_before = np.uint64(8)
            place += n_before
        if n_before:
            value = (value ^ eight) * _MIX
            value ^= value >> np.uint64(32)
            length += n_before
        if is_space and length:
            out[count] = value + length
            count, value, length = count + 1, _START, np.uint64(0)
    if length:
        out[count] = value + length
        count += 1
    return count


@nb.njit(inline="always")
def _shingle(words, start, stop):
    hashed = _START
    for place in range(start, stop):
        hashed = (hashed ^ words[place]) * _MIX
        hashed ^= hashed >> np.uint64(32)
    return hashed


@nb.njit(inline="always")
def _fmix(value):
    """MurmurHash3's 32-bit finalizer, which datasketch applies before it permutes."""
    value ^= value >> np.uint32(16)
    value = np.uint32(value * np.uint32(0x85EBCA6B))
    value ^= value >> np.uint32(13)
    value = np.uint32(value * np.uint32(0xC2B2AE35))
    return np.uint32(value ^ (value >> np.uint32(16)))


@nb.njit(inline="always")
def _word_room(offsets):
    """The most words that one of the texts can have."""
    longest = 0
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    return longest // 2 + 1


@nb.njit(cache=True, nogil=True)
def _sign(data, offsets, salt, factors, summands, n_words, out, prints):
    n_texts, n_permutations = out.shape
    room = _word_room(offsets)
    words, values = np.empty(room, np.uint64), np.empty(room + 3, np.uint32)
    for text in range(n_texts):
        count = _words(data, offsets[text], offsets[text + 1], words)
        n_shingles = max(count - n_words + 1, 1)
        for start in range(n_shingles):
            shingle = _shingle(words, start, min(start + n_words, count))
            values[start] = _fmix(np.uint32(shingle & np.uint64(0xFFFFFFFF)))
        values[n_shingles : n_shingles + 3] = values[n_shingles - 1]
        lowest = out[text]
        lowest[:] = np.uint32(0xFFFFFFFF)
        for start in range(0, n_shingles, 4):  # four at a time: memory is read less often
            one, two, three, four = values[start : start + 4]
            for k in range(n_permutations):
                factor, summand = factors[k], summands[k]
                left = min(np.uint32(factor * one + summand), np.uint32(factor * two + summand))
                right = min(np.uint32(factor * three + summand), np.uint32(factor * four + summand))
                lowest[k] = min(lowest[k], left, right)
        one, two = _START ^ salt[text], _OTHER_MIX ^ salt[text]
        for k in range(count):
            one = (one ^ words[k]) * _MIX
            one ^= one >> np.uint64(32)
            two = (two + words[k]) * _OTHER_MIX
            two ^= two >> np.uint64(29)
        prints[text, 0], prints[text, 1] = one, two


@nb.njit(cache=True, nogil=True)
def _band(signed, salt, n_rows, out):
    n_bands, n_texts = out.shape
    for text in range(n_texts):
        for band in range(n_bands):
            value = _START * np.uint64(band + 1) ^ salt[text]
            for k in range(band * n_rows, (band + 1) * n_rows):
                value = (value ^ np.uint64(signed[text, k])) * _MIX
                value ^= value >> np.uint64(29)
            out[band, text] = value


@nb.njit(cache=True, nogil=True)
def _count_words(data, offsets, out):
    for text in range(len(offsets) - 1):
        own = data[offsets[text] : offsets[text + 1]]
        count = 0
        for k in range(len(own) - 1):  # where words begin; without a state, several at once
            count += _is_space(own[k]) & (not _is_space(own[k + 1]))
        out[text] = count + (len(own) > 0 and not _is_space(own[0]))


@nb.njit(cache=True, nogil=True)
def _fill_shingles(data, offsets, n_words, bounds, out, lengths):
    """Write each text's distinct shingles, ascending, from its bound on; note how many."""
    words = np.empty(_word_room(offsets), np.uint64)
    for text in range(len(offsets) - 1):
        count = _words(data, offsets[text], offsets[text + 1], words)
        place = bounds[text]
        for start in range(max(count - n_words + 1, 1)):
            out[place + start] = _shingle(words, start, min(start + n_words, count))
        own = out[place : bounds[text + 1]]
        own.sort()
        n_distinct = 1
        for k in range(1, len(own)):
            if own[k] != own[n_distinct - 1]:
                own[n_distinct] = own[k]
                n_distinct += 1
        lengths[text] = n_distinct


@nb.njit(cache=True, nogil=True)
def _close_gaps(hashes, bounds, lengths):
    offsets = np.empty(len(bounds), np.int64)
    offsets[0] = 0
    for text in range(len(lengths)):
        start, place = bounds[text], offsets[text]
        for k in range(lengths[text]):
            hashes[place + k] = hashes[start + k]
        offsets[text + 1] = place + lengths[text]
    return hashes[: offsets[-1]], offsets


@nb.njit(cache=True, nogil=True)
def _jaccards(hashes, offsets, left, right, out):
    for pair in range(len(left)):
        i, i_end = offsets[left[pair]], offsets[left[pair] + 1]
        j, j_end = offsets[right[pair]], offsets[right[pair] + 1]
        n_union = (i_end - i) + (j_end - j)
        n_shared = 0
        while i < i_end and j < j_end:
            if hashes[i] == hashes[j]:
                n_shared += 1
                i += 1
                j += 1
            elif hashes[i] < hashes[j]:
                i += 1
            else:
                j += 1
        out[pair] = n_shared / (n_union - n_shared)
