//! Graphics modes as UEFI describes them (UEFI specification, "EFI_GRAPHICS_OUTPUT_PROTOCOL"), and
//! which of them to use.

use bootloader_api::info::{FrameBufferInfo, PixelFormat};

/// At least this many pixels across and down are enough for a summary without line breaks.
const ENOUGH: (usize, usize) = (1024, 768);

/// With more than this, the letters get too small to read.
const MOST: (usize, usize) = (1920, 1200);

/// Where the colours are in a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Bytes: red, green, blue, unused.
    Rgb,
    /// Bytes: blue, green, red, unused.
    Bgr,
    /// The bits of red, green, blue, and those that are unused, in a little-endian number.
    Masks([u32; 4]),
    /// Pixels cannot be written.
    None,
}

/// A graphics mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
    /// Pixels from one line to the next.
    pub stride: usize,
    /// What a pixel looks like.
    pub layout: Layout,
}

impl Mode {
    /// What the kernel needs to know to draw; `None` if it could not.
    pub fn info(&self) -> Option<FrameBufferInfo> {
        let Self { width, height, stride, layout } = *self;
        let (pixel_format, bytes_per_pixel) = match layout {
            Layout::Rgb => (PixelFormat::Rgb, 4),
            Layout::Bgr => (PixelFormat::Bgr, 4),
            Layout::Masks(masks) => from_masks(masks)?,
            Layout::None => return None,
        };
        let byte_len = stride.checked_mul(height)?.checked_mul(bytes_per_pixel)?;
        let usable = width > 0 && height > 0 && stride >= width;
        usable.then_some(FrameBufferInfo {
            byte_len,
            width,
            height,
            pixel_format,
            bytes_per_pixel,
            stride,
        })
    }

    /// Whether there is no need to look for a better one.
    pub fn is_good(&self) -> bool {
        self.info().is_some() && self.width >= ENOUGH.0 && self.height >= ENOUGH.1
    }

    /// Of two modes, the one with the greater rank is better: the largest that is not too large, else
    /// the smallest.
    pub fn rank(&self) -> impl Ord + use<> {
        self.info().map(|_| {
            let fits = self.width <= MOST.0 && self.height <= MOST.1;
            let pixels = self.width as i64 * self.height as i64;
            (fits, if fits { pixels } else { -pixels })
        })
    }
}

/// The format that has its colours where the masks say, and its size in bytes. Each has eight bits.
fn from_masks(masks: [u32; 4]) -> Option<(PixelFormat, usize)> {
    let [red, green, blue, _] = masks;
    let position = |mask: u32| {
        let shift = mask.trailing_zeros();
        (mask.checked_shr(shift) == Some(0xff)).then_some(shift as u8)
    };
    let positions = (position(red)?, position(green)?, position(blue)?);
    let all = masks.iter().fold(0, |all, mask| all | mask);
    let bytes = (u32::BITS - all.leading_zeros()).div_ceil(8) as usize;
    let format = match positions {
        (0, 8, 16) => PixelFormat::Rgb,
        (16, 8, 0) => PixelFormat::Bgr,
        (red_position, green_position, blue_position) => {
            PixelFormat::Unknown { red_position, green_position, blue_position }
        }
    };
    Some((format, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(width: usize, height: usize) -> Mode {
        Mode { width, height, stride: width, layout: Layout::Bgr }
    }

    fn best(modes: &[Mode]) -> (usize, usize) {
        let best = modes.iter().max_by_key(|mode| mode.rank()).unwrap();
        (best.width, best.height)
    }

    #[test]
    fn large_but_not_too_large() {
        let usual = [mode(640, 480), mode(1920, 1080), mode(1024, 768), mode(2560, 1440)];
        assert_eq!(best(&usual), (1920, 1080));
        assert_eq!(best(&[mode(3840, 2160), mode(2560, 1440)]), (2560, 1440));
        let no_pixels = Mode { layout: Layout::None, ..mode(1280, 1024) };
        assert_eq!(best(&[no_pixels, mode(800, 600)]), (800, 600));
        assert!(mode(1024, 768).is_good() && mode(3840, 2160).is_good());
        assert!(!mode(1023, 768).is_good() && !mode(1280, 720).is_good());
        assert!(!no_pixels.is_good());
    }

    #[test]
    fn the_size_in_memory_includes_what_is_not_seen() {
        let info = Mode { stride: 832, ..mode(800, 600) }.info().unwrap();
        assert_eq!(info.byte_len, 832 * 600 * 4);
        assert_eq!((info.stride, info.bytes_per_pixel), (832, 4));
        assert_eq!(info.pixel_format, PixelFormat::Bgr);
    }

    #[test]
    fn modes_that_make_no_sense_are_not_used() {
        assert!(Mode { stride: 799, ..mode(800, 600) }.info().is_none());
        assert!(Mode { stride: usize::MAX, ..mode(800, 600) }.info().is_none());
        assert!(mode(0, 600).info().is_none());
    }

    #[test]
    fn masks_say_where_the_colours_are() {
        let of = |masks| Mode { layout: Layout::Masks(masks), ..mode(8, 8) }.info();
        let format = |masks| of(masks).map(|info| (info.pixel_format, info.bytes_per_pixel));
        let (a, b, c, d) = (0xff, 0xff00, 0xff_0000, 0xff00_0000);
        assert_eq!(format([a, b, c, d]), Some((PixelFormat::Rgb, 4)));
        assert_eq!(format([c, b, a, 0]), Some((PixelFormat::Bgr, 3)));
        let other = PixelFormat::Unknown { red_position: 24, green_position: 16, blue_position: 8 };
        assert_eq!(format([d, c, b, a]), Some((other, 4)));
        // 5-6-5 and 10-10-10.
        assert!(of([0xf800, 0x7e0, 0x1f, 0]).is_none());
        assert!(of([0x3ff0_0000, 0xf_fc00, 0x3ff, 0xc000_0000]).is_none());
        assert!(of([0, 0, 0, 0]).is_none());
    }
}
