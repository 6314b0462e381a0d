"""DICOM images: each frame decompressed, its values shown as the standard says, with pseudonyms and metadata.

What a file claims (rows, bits, frames) and what its compressed frames claim is held against limits before memory is given.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate, generate_frames, get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    RLELossless,
)

from cv_factory_ops.domain import Decoded, Decoding
from cv_factory_ops.errors import Rejected
from domain_medical.dicom import PIXEL_KEYWORDS, identity, metadata, number, read, spacing, text, uid
from domain_medical.intensities import Stored, colour_image, grey_image, palette_image

MAX_PIXELS = 100_000_000
"""Rows times columns above which an image is refused: the largest mammograms have a quarter of it."""

MAX_FRAME_BYTES = 4 * MAX_PIXELS
"""Bytes above which a decompressed frame is refused."""

_NATIVE = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
_FASTEST = "pyjpegls"
"""pydicom's plugin of CharLS, if installed: JPEG-LS takes it a third of the time of libjpeg, which would be asked first."""
_START_OF_JPEG2000 = b"\xff\x4f\xff\x51"
_FRAME_KEYWORDS = (
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PhotometricInterpretation",
    "PresentationLUTShape",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "FloatPixelPaddingValue",
    "FloatPixelPaddingRangeLimit",
    "DoubleFloatPixelPaddingValue",
    "DoubleFloatPixelPaddingRangeLimit",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "EstimatedRadiographicMagnificationFactor",
    "NominalScannedPixelSpacing",
    "SequenceOfUltrasoundRegions",
)
"""What the image of a frame depends on; functional groups may say it anew for each frame."""
_FRAME_MACROS = (
    "PixelMeasuresSequence",
    "FramePixelDataPropertiesSequence",
    "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
)


def decode(data: bytes, decoding: Decoding) -> Iterator[Decoded]:
    """Images with pseudonyms and metadata: the middle frame, or each in turn; the file is parsed once.

    Raises:
        Rejected: ``not_dicom``, ``truncated``, ``no_pixels``, ``too_large`` or ``undecodable``; of several frames, those
            before a broken one are yielded first.
    """
    study = read(data)
    with _refusing():
        pixels = Pixels(study)
    patient, study_uid = identity(study)
    known = metadata(study)
    instance = uid(study, "SOPInstanceUID")
    indices = range(pixels.frames) if decoding.frames == "all" else [pixels.frames // 2]
    words = pixels.words(indices)
    for index in indices:
        with _refusing():
            frame = _frame_attributes(study, index)
            image = _shown(next(words), study, frame, decoding, pixels)
        frame_index = index if pixels.frames > 1 else None
        yield Decoded(image, patient, study_uid, instance, frame_index, spacing(frame), known)


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever a broken file makes fail is a refusal, told by its kind alone: messages quote values."""
    try:
        yield
    except Rejected:
        raise
    except Exception as error:
        _undecodable(f"the pixel data cannot be decoded ({type(error).__name__})")


def _undecodable(reason: str) -> NoReturn:
    raise Rejected("undecodable", reason) from None


def _frame_attributes(study: Dataset, index: int) -> Dataset:
    """What holds for a frame: of its functional groups (PS3.3 C.7.6.16), else of the shared ones, else of the file."""
    shared, frames = study.get("SharedFunctionalGroupsSequence"), study.get("PerFrameFunctionalGroupsSequence")
    groups = [*(shared or [])[:1], *(frames or [])[index : index + 1]]
    if not groups:
        return study
    attributes = Dataset()
    for keyword in _FRAME_KEYWORDS:
        if keyword in study:
            attributes[keyword] = study[keyword]
    for group in groups:
        for macro in _FRAME_MACROS:
            if group.get(macro):
                attributes.update(group[macro].value[0])
    return attributes


def _shown(words: NDArray[Any], study: Dataset, frame: Dataset, decoding: Decoding, pixels: Pixels) -> NDArray[np.uint16]:
    if words.ndim == 3:
        return colour_image(words, decoding, pixels.stored)
    if pixels.photometric == "PALETTE COLOR":
        return palette_image(words, study, decoding, pixels.stored)
    return grey_image(words, frame, decoding, pixels.stored)


class Pixels:
    """The Image Pixel module (PS3.3 C.7.6.3) of a data set, checked against the limits and the bytes that are there.

    Raises:
        Rejected: ``no_pixels``, ``truncated``, ``too_large`` or ``undecodable``.
    """

    def __init__(self, study: FileDataset) -> None:
        keyword = next((keyword for keyword in PIXEL_KEYWORDS if keyword in study), None)
        if keyword is None:
            _refuse_missing(study)
        self.keyword = keyword
        self.syntax = UID(study.file_meta.TransferSyntaxUID)
        self.is_native = self.syntax in _NATIVE
        self.rows, self.columns = _positive(study, "Rows"), _positive(study, "Columns")
        if self.rows * self.columns > MAX_PIXELS:
            raise Rejected("too_large", f"has {self.rows} x {self.columns} pixels; allowed are {MAX_PIXELS}")
        self.samples = _positive(study, "SamplesPerPixel", 1)
        self.frames = _positive(study, "NumberOfFrames", 1)
        self.allocated = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword) or _positive(study, "BitsAllocated")
        self.photometric = text(study, "PhotometricInterpretation") or "MONOCHROME2"
        self.planar = number(study, "PlanarConfiguration")
        if self.frame_bits // 8 > MAX_FRAME_BYTES:
            raise Rejected("too_large", f"has {self.frame_bits // 8} bytes a frame; allowed are {MAX_FRAME_BYTES}")
        self.stored = self._stored(study)
        self._locate(study)

    @property
    def frame_bits(self) -> int:
        bits = self.rows * self.columns * self.samples * self.allocated
        return bits * 2 // 3 if self.photometric == "YBR_FULL_422" and self.is_native else bits

    def _stored(self, study: Dataset) -> Stored:
        if self.keyword != "PixelData":
            return Stored(self.allocated, 0, True)
        bits, high = _positive(study, "BitsStored"), number(study, "HighBit")
        if bits > self.allocated:
            _undecodable(f"BitsStored is {bits}; allowed are BitsAllocated, {self.allocated}, at most")
        is_moved = high is not None and bits - 1 < high < self.allocated and not self._is_jpeg
        return Stored(bits, int(high) - bits + 1 if high and is_moved else 0, number(study, "PixelRepresentation") == 1)

    @property
    def _is_jpeg(self) -> bool:
        return not self.is_native and self.syntax != RLELossless

    def _locate(self, study: FileDataset) -> None:
        """Find the bytes in the file, without copying them."""
        tag = tag_for_keyword(self.keyword)
        raw = study.get_item(tag or 0, keep_deferred=True)
        if not isinstance(raw, RawDataElement) or not isinstance(study.buffer, BytesIO):
            _undecodable("the pixel data is no element of the file")
        self.vr: str = raw.VR or "OW"
        self.start: int = raw.value_tell
        self.file: bytes = study.buffer.getvalue()
        self.data: memoryview = memoryview(self.file)[
            self.start : None if raw.length == 0xFFFFFFFF else self.start + raw.length
        ]
        if self.is_native and len(self.data) < math.ceil(self.frame_bits * self.frames / 8):
            raise Rejected("truncated", "the pixel data is shorter than the image")
        self.offsets: tuple[bytes, bytes] | None = None
        if "ExtendedOffsetTable" in study and "ExtendedOffsetTableLengths" in study:
            self.offsets = study.ExtendedOffsetTable, study.ExtendedOffsetTableLengths

    def words(self, indices: range | list[int]) -> Iterator[NDArray[Any]]:
        """Frames as they are stored: (rows, columns), or (rows, columns, 3) red, green, blue."""
        if self.is_native:
            for index in indices:
                yield self._array(self.syntax, self.data, index, self.frames)
            return
        source = BytesIO(self.file)
        source.seek(self.start)
        several: dict[str, Any] = {"number_of_frames": self.frames, "extended_offsets": self.offsets}
        frames = generate_frames(source, **several) if len(indices) > 1 else iter([get_frame(source, indices[0], **several)])
        for _, frame in zip(indices, frames, strict=False):
            yield self._decompressed(frame)

    def _decompressed(self, frame: bytes) -> NDArray[Any]:
        if self.syntax == RLELossless:
            return self._array(ExplicitVRLittleEndian, _unpacked(frame, self), 0, 1, planar_configuration=1)
        if is_jpeg2000 := self.syntax in JPEG2000TransferSyntaxes:
            frame = frame[max(frame.find(_START_OF_JPEG2000), 0) :]  # boxes of JP2 around it have no place in DICOM
        claimed = _claimed_size(frame, is_jpeg2000=is_jpeg2000)
        if any(given > said for given, said in zip(claimed, (self.rows, self.columns, self.samples), strict=True)):
            _undecodable("a compressed frame has more rows, columns or samples than the file says")
        return self._array(self.syntax, encapsulate([frame], has_bot=False), 0, 1)

    def _array(self, syntax: UID, data: Any, index: int, frames: int, **options: Any) -> NDArray[Any]:
        given: dict[str, Any] = {
            "rows": self.rows,
            "columns": self.columns,
            "samples_per_pixel": self.samples,
            "number_of_frames": frames,
            "photometric_interpretation": self.photometric,
            "bits_allocated": self.allocated,
            "pixel_keyword": self.keyword,
            "pixel_vr": self.vr,
            "allow_excess_frames": False,
        }
        if self.keyword == "PixelData":
            given |= {"bits_stored": self.stored.bits, "pixel_representation": int(self.stored.signed)}
        if self.samples > 1:
            given["planar_configuration"] = int(self.planar or 0)
        if syntax in _NATIVE:
            given |= {"view_only": True, "correct_unused_bits": False}
        decoder = get_decoder(syntax)
        plugin = _FASTEST if _FASTEST in decoder.available_plugins else ""
        array, found = decoder.as_array(data, index=index, decoding_plugin=plugin, **(given | options))
        if array.ndim == 3 and found["photometric_interpretation"] != "RGB":
            _undecodable("the photometric interpretation is none that can be shown")
        return array


def _refuse_missing(study: FileDataset) -> NoReturn:
    kind = text(study, "SOPClassUID") or text(study.file_meta, "MediaStorageSOPClassUID")
    if "Rows" in study or kind is None or "Image" in UID(kind).name:
        raise Rejected("truncated", "is an image without pixel data: the file is cut")
    raise Rejected("no_pixels", "has no pixel data: it is not an image")


def _positive(study: Dataset, keyword: str, default: int | None = None) -> int:
    value = number(study, keyword) or default
    if not value or value < 1:
        _undecodable(f"{keyword} is missing or not a positive number")
    return int(value)


def _unpacked(frame: bytes, pixels: Pixels) -> bytes:
    """A frame of RLE Lossless (PS3.5 annex G) as uncompressed planes, low byte first.

    Segments are unpacked one by one: the plugin's function for whole frames panics on broken ones, with an exception that is
    no Exception, and pydicom's own takes five times as long.
    """
    from rle.rle import decode_segment  # type: ignore[import-not-found]

    count, *offsets = struct.unpack("<16L", frame[:64])
    size = max(pixels.allocated // 8, 1)
    length = math.ceil(pixels.rows * pixels.columns * pixels.allocated / 8 / size)
    if count != pixels.samples * size:
        raise ValueError("a frame has another number of segments than its pixels have bytes")
    ends = [*offsets[1:count], len(frame)]
    planes = np.zeros((pixels.samples, length), f"<u{size}")
    for segment, (start, end) in enumerate(zip(offsets[:count], ends, strict=True)):
        packed = frame[start : min(end, start + 2 * length + 2)]
        if len(packed) < 2:
            raise ValueError("a segment is empty")
        plane = planes[segment // size]  # the highest byte comes first
        plane <<= 8 * (size > 1)
        plane |= np.frombuffer(decode_segment(packed), np.uint8, length)
    return planes.tobytes()


def _claimed_size(codestream: bytes, *, is_jpeg2000: bool) -> tuple[int, int, int]:
    """Rows, columns and samples that a compressed frame itself claims: what its decoder will take memory for.

    They are in the SIZ marker of JPEG 2000 (ISO/IEC 15444-1 A.5.1), and in the frame header of JPEG and JPEG-LS
    (ISO/IEC 10918-1 B.2.2).
    """
    if is_jpeg2000:
        right, bottom, left, top, *_, samples = struct.unpack(">8LH", codestream[8:42])
        return bottom - top, right - left, samples
    at = 2
    while True:
        marker, length = struct.unpack(">HH", codestream[at : at + 4])
        if (0xFFC0 <= marker <= 0xFFCF and marker not in {0xFFC4, 0xFFC8, 0xFFCC}) or marker == 0xFFF7:
            rows, columns, samples = struct.unpack(">HHB", codestream[at + 5 : at + 10])
            return rows, columns, samples
        at += 2 + length
