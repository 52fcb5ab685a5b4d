//! Graphics modes as a BIOS describes them (VESA BIOS Extension core functions standard 3.0, "VBE
//! Function 01h - Return VBE Mode Information"), and which of them to use.

use bootloader_api::info::{FrameBufferInfo, PixelFormat};
use x86_64::PhysAddr;

use crate::load::Framebuffer;

/// Size of the description of a mode in bytes.
pub const MODE_SIZE: usize = 256;

/// From this version of the standard on, lines and colours of a linear framebuffer are described
/// apart from those of a banked one.
const VERSION_3: u16 = 0x300;

/// Mode attributes: supported, colour, graphics, linear framebuffer.
const ATTRIBUTES: u16 = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 7;

/// Memory models: packed pixels, which some firmware says of true colours too, and direct colour.
const MODELS: [u8; 2] = [4, 6];

/// The smallest and the largest screen that is used, in pixels.
const SMALLEST: (usize, usize) = (640, 480);
const LARGEST: (usize, usize) = (1920, 1200);

/// What nearly every screen shows well, and text on it is large enough to read.
const PREFERRED: (usize, usize) = (1024, 768);

/// The framebuffer of the mode that these bytes describe, if it has a linear one with a byte for each
/// colour and a size that is used. `version` is that of the BIOS.
pub fn decode(mode: &[u8; MODE_SIZE], version: u16) -> Option<Framebuffer> {
    let word = |at: usize| u16::from_le_bytes([mode[at], mode[at + 1]]);
    let (line_at, colours_at) = if version >= VERSION_3 { (50, 54) } else { (16, 31) };
    let bytes_per_pixel = usize::from(mode[25]) / 8;
    let bytes_per_line = usize::from(word(line_at));
    let (width, height) = (usize::from(word(18)), usize::from(word(20)));
    let start = u64::from(word(40)) | u64::from(word(42)) << 16;

    let is_usable = word(0) & ATTRIBUTES == ATTRIBUTES
        && MODELS.contains(&mode[27])
        && matches!(mode[25], 24 | 32)
        && start != 0
        && (SMALLEST.0..=LARGEST.0).contains(&width)
        && (SMALLEST.1..=LARGEST.1).contains(&height)
        && bytes_per_line >= width * bytes_per_pixel
        && bytes_per_line % bytes_per_pixel == 0;
    is_usable.then_some(())?;

    // Size and position of red, green and blue.
    let [8, red, 8, green, 8, blue] = mode[colours_at..][..6] else { return None };
    let pixel_format = match [red, green, blue] {
        [0, 8, 16] => PixelFormat::Rgb,
        [16, 8, 0] => PixelFormat::Bgr,
        positions if positions.iter().all(|p| usize::from(*p) + 8 <= bytes_per_pixel * 8) => {
            let [red_position, green_position, blue_position] = positions;
            PixelFormat::Unknown { red_position, green_position, blue_position }
        }
        _ => return None,
    };
    let info = FrameBufferInfo {
        byte_len: bytes_per_line * height,
        width,
        height,
        pixel_format,
        bytes_per_pixel,
        stride: bytes_per_line / bytes_per_pixel,
    };
    Some(Framebuffer { start: PhysAddr::new(start), info })
}

/// Orders modes: the greatest is used.
pub fn rank(info: &FrameBufferInfo) -> impl Ord + use<> {
    let is_preferred = (info.width, info.height) == PREFERRED;
    (info.bytes_per_pixel, is_preferred, info.width * info.height)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mode with blue in the lowest byte, described as version 3 does and, with no colours, as
    /// version 2.
    fn mode(width: u16, height: u16, bits: u8) -> [u8; MODE_SIZE] {
        let line = width * u16::from(bits / 8);
        let mut mode = [0; MODE_SIZE];
        let mut put = |at: usize, bytes: &[u8]| mode[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &0x9bu16.to_le_bytes());
        put(16, &line.to_le_bytes());
        put(18, &width.to_le_bytes());
        put(20, &height.to_le_bytes());
        put(24, &[1, bits, 1, 6]);
        put(40, &0xfd00_0000u32.to_le_bytes());
        put(50, &line.to_le_bytes());
        put(54, &[8, 16, 8, 8, 8, 0]);
        mode
    }

    fn colours(mode: &[u8; MODE_SIZE], version: u16) -> Option<PixelFormat> {
        decode(mode, version).map(|found| found.info.pixel_format)
    }

    #[test]
    fn a_mode_is_described_in_full() {
        let mut mode = mode(1024, 768, 32);
        mode[50..52].copy_from_slice(&4160u16.to_le_bytes());
        let found = decode(&mode, 0x300).unwrap();
        assert_eq!(found.start.as_u64(), 0xfd00_0000);
        let expected = FrameBufferInfo {
            byte_len: 4160 * 768,
            width: 1024,
            height: 768,
            pixel_format: PixelFormat::Bgr,
            bytes_per_pixel: 4,
            stride: 1040,
        };
        // It cannot be compared.
        assert_eq!(format!("{:?}", found.info), format!("{expected:?}"));
    }

    #[test]
    fn colours_come_from_where_the_version_puts_them() {
        let mut mode = mode(800, 600, 24);
        assert_eq!(colours(&mode, 0x300), Some(PixelFormat::Bgr));
        assert_eq!(colours(&mode, 0x200), None);
        mode[31..37].copy_from_slice(&[8, 0, 8, 8, 8, 16]);
        assert_eq!(colours(&mode, 0x200), Some(PixelFormat::Rgb));
        mode[31..37].copy_from_slice(&[8, 8, 8, 16, 8, 0]);
        let odd = PixelFormat::Unknown { red_position: 8, green_position: 16, blue_position: 0 };
        assert_eq!(colours(&mode, 0x200), Some(odd));
        for outside in [[8, 24, 8, 8, 8, 0], [10, 16, 8, 8, 8, 0], [8, 255, 8, 8, 8, 0]] {
            mode[31..37].copy_from_slice(&outside);
            assert_eq!(colours(&mode, 0x200), None, "{outside:?}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_left_out() {
        let good = mode(1024, 768, 32);
        assert!(decode(&good, 0x300).is_some());
        // Each attribute is needed, and the others do not matter.
        for bit in 0..16 {
            let mut mode = good;
            mode[bit / 8] ^= 1 << (bit % 8);
            let needed = ATTRIBUTES >> bit & 1 != 0;
            assert_eq!(decode(&mode, 0x300).is_none(), needed, "{bit}");
        }
        // Bits a pixel, memory model, no address, lines that are too short or end inside a pixel.
        for (at, bytes) in
            [(25, &[8][..]), (25, &[16]), (27, &[3]), (43, &[0]), (50, &[0xff, 0x0f]), (50, &[2])]
        {
            let mut mode = good;
            mode[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(decode(&mode, 0x300).is_none(), "{at} {bytes:?}");
        }
        for (width, height) in [(320, 200), (640, 400), (1920, 1440), (2560, 1080), (0, 0)] {
            assert!(decode(&mode(width, height, 32), 0x300).is_none(), "{width}x{height}");
        }
        assert!(decode(&[0; MODE_SIZE], 0x300).is_none());
        assert!(decode(&[0xff; MODE_SIZE], 0x300).is_none());
    }

    #[test]
    fn the_preferred_size_wins_then_the_largest_with_more_bits_first() {
        let best = |modes: &[(u16, u16, u8)]| {
            let infos = modes.iter().map(|&(width, height, bits)| {
                decode(&mode(width, height, bits), 0x300).unwrap().info
            });
            let best = infos.max_by_key(rank).unwrap();
            (best.width, best.height, best.bytes_per_pixel)
        };
        let small = (640, 480, 32);
        assert_eq!(best(&[small, (1024, 768, 24), (1920, 1200, 24)]), (640, 480, 4));
        assert_eq!(best(&[small, (1024, 768, 32), (1920, 1200, 32)]), (1024, 768, 4));
        assert_eq!(best(&[small, (1280, 1024, 32), (800, 600, 32)]), (1280, 1024, 4));
        assert_eq!(best(&[(640, 480, 24), (800, 600, 24)]), (800, 600, 3));
    }
}
