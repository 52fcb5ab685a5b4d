//! A framebuffer: characters as pixels.
//!
//! It is only written: reading from a graphics card's memory is slow.

use bootloader_api::info::{FrameBufferInfo, PixelFormat};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

use super::grid::{Cell, MAX_COLUMNS, MAX_ROWS};
use super::{Colour, Surface};

/// How many steps there are from the background to a character's colour.
const STEPS: usize = 64;
/// A screen of fewer characters is of no use.
const MIN_COLUMNS: usize = 40;
const MIN_ROWS: usize = 10;

/// Red, green and blue.
type Rgb = [u8; 3];

const BACKGROUND: Rgb = [0x12, 0x15, 0x1c];
const TITLE_BACKGROUND: Rgb = [0x1d, 0x3a, 0x5f];

/// Foreground and background.
const fn colours(colour: Colour) -> (Rgb, Rgb) {
    match colour {
        Colour::Text => ([0xc8, 0xcc, 0xd4], BACKGROUND),
        Colour::Title => ([0xff, 0xff, 0xff], TITLE_BACKGROUND),
        Colour::Error => ([0xff, 0x6b, 0x68], BACKGROUND),
        Colour::Warning => ([0xf2, 0xc5, 0x5c], BACKGROUND),
        Colour::Good => ([0x7f, 0xd1, 0x8b], BACKGROUND),
        Colour::Guest => ([0x6c, 0xc0, 0xe8], BACKGROUND),
        Colour::Heading => ([0xff, 0xff, 0xff], BACKGROUND),
        Colour::Faint => ([0x80, 0x87, 0x93], BACKGROUND),
    }
}

/// A linear framebuffer.
pub struct Pixels<'a> {
    buffer: &'a mut [u8],
    info: FrameBufferInfo,
    font: RasterHeight,
    /// Size of a character in pixels.
    glyph: (usize, usize),
    /// Size in characters.
    size: (usize, usize),
    /// Width of the empty edges in pixels.
    edge: usize,
    /// Pixels of each colour, from the background to the foreground.
    palette: [[u32; STEPS]; Colour::COUNT],
}

impl<'a> Pixels<'a> {
    /// A framebuffer of this shape; `None` if it is not of a kind that is known, or too small.
    pub fn new(buffer: &'a mut [u8], info: FrameBufferInfo) -> Option<Self> {
        let positions = match info.pixel_format {
            PixelFormat::Rgb => [0, 8, 16],
            PixelFormat::Bgr => [16, 8, 0],
            PixelFormat::Unknown { red_position, green_position, blue_position } => {
                [red_position, green_position, blue_position]
            }
            _ => return None,
        };
        let bits = info.bytes_per_pixel * 8;
        let lines = info.stride.checked_mul(info.bytes_per_pixel)?.checked_mul(info.height)?;
        let fits = matches!(bits, 24 | 32)
            && positions.iter().all(|position| usize::from(*position) + 8 <= bits)
            && info.stride >= info.width
            && lines <= buffer.len();
        fits.then_some(())?;
        let font = match info.width.min(info.height) {
            0..900 => RasterHeight::Size16,
            900..1600 => RasterHeight::Size24,
            _ => RasterHeight::Size32,
        };
        let glyph = (get_raster_width(FontWeight::Regular, font), font.val());
        // Half a character's width is left free on each side, and below the title.
        let columns = (info.width.saturating_sub(glyph.0) / glyph.0).min(MAX_COLUMNS);
        let rows = (info.height.saturating_sub(2 * glyph.0) / glyph.1).min(MAX_ROWS);
        (columns >= MIN_COLUMNS && rows >= MIN_ROWS).then_some(())?;
        let edge = glyph.0 / 2;
        let palette = Colour::ALL.map(|colour| {
            let (front, back) = colours(colour);
            core::array::from_fn(|step| pixel(mix(back, front, step), positions))
        });
        Some(Self { buffer, info, font, glyph, size: (columns, rows), edge, palette })
    }

    /// Columns and rows.
    pub fn size(&self) -> (usize, usize) {
        self.size
    }

    /// Fills the screen with the background.
    pub fn clear(&mut self) {
        self.fill(Colour::Text, self.info.height);
    }

    /// Fills so many lines at the top with a colour's background.
    fn fill(&mut self, colour: Colour, lines: usize) {
        let pixel = self.palette[colour as usize][0].to_le_bytes();
        let bytes = lines * self.info.stride * self.info.bytes_per_pixel;
        let Some(lines) = self.buffer.get_mut(..bytes) else { return };
        match self.info.bytes_per_pixel {
            4 => lines.as_chunks_mut().0.fill(pixel),
            _ => {
                let [first, second, third, _] = pixel;
                lines.as_chunks_mut().0.fill([first, second, third]);
            }
        }
    }

    /// Where a character is: its left and its top.
    fn place(&self, column: usize, row: usize) -> (usize, usize) {
        let below_title = if row == 0 { 0 } else { self.edge };
        (self.edge + column * self.glyph.0, self.edge + row * self.glyph.1 + below_title)
    }

    fn draw_pixels<const BYTES: usize>(&mut self, left: usize, top: usize, cells: &[Cell]) {
        let (width, height) = self.glyph;
        for line in 0..height {
            let start = ((top + line) * self.info.stride + left) * BYTES;
            let Some(pixels) = self.buffer.get_mut(start..start + cells.len() * width * BYTES)
            else {
                return;
            };
            let pixels = pixels.as_chunks_mut::<BYTES>().0;
            for (pixels, cell) in pixels.chunks_exact_mut(width).zip(cells) {
                let palette = &self.palette[cell.colour as usize];
                let put = |pixel: &mut [u8; BYTES], step: usize| {
                    pixel.copy_from_slice(&palette[step % STEPS].to_le_bytes()[..BYTES]);
                };
                match glyph(cell.character, self.font) {
                    None => pixels.iter_mut().for_each(|pixel| put(pixel, 0)),
                    Some(raster) => {
                        let line = raster[line * width..][..width].iter();
                        let scale = 256 / STEPS;
                        pixels
                            .iter_mut()
                            .zip(line)
                            .for_each(|(pixel, covered)| put(pixel, usize::from(*covered) / scale));
                    }
                }
            }
        }
    }
}

impl Surface for Pixels<'_> {
    fn draw(&mut self, column: usize, row: usize, cells: &[Cell]) {
        let (left, top) = self.place(column, row);
        // The title's background goes to the edges of the screen.
        if (column, row) == (0, 0) && cells.first().is_some_and(|cell| cell.colour == Colour::Title)
        {
            self.fill(Colour::Title, top + self.glyph.1 + self.edge);
        }
        match self.info.bytes_per_pixel {
            4 => self.draw_pixels::<4>(left, top, cells),
            _ => self.draw_pixels::<3>(left, top, cells),
        }
    }
}

/// A character's pixels, each from 0 (background) to 255; `None` where nothing is to be seen.
fn glyph(character: u8, font: RasterHeight) -> Option<&'static [u8]> {
    match character {
        0 | b' ' => None,
        _ => {
            let raster = get_raster(char::from(character), FontWeight::Regular, font)
                .or_else(|| get_raster('?', FontWeight::Regular, font));
            raster.map(|raster| raster.pixels())
        }
    }
}

/// A colour between two others.
fn mix(from: Rgb, to: Rgb, step: usize) -> Rgb {
    core::array::from_fn(|index| {
        let (from, to) = (usize::from(from[index]), usize::from(to[index]));
        ((from * (STEPS - 1 - step) + to * step) / (STEPS - 1)) as u8
    })
}

/// A colour as a pixel, with red, green and blue at these bits.
fn pixel(colour: Rgb, positions: [u8; 3]) -> u32 {
    colour.iter().zip(positions).fold(0, |pixel, (part, at)| pixel | u32::from(*part) << at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{vec, vec::Vec};

    fn info(width: usize, height: usize, stride: usize, bytes: usize) -> FrameBufferInfo {
        FrameBufferInfo {
            byte_len: stride * height * bytes,
            width,
            height,
            pixel_format: PixelFormat::Bgr,
            bytes_per_pixel: bytes,
            stride,
        }
    }

    fn cells(text: &str, colour: Colour) -> Vec<Cell> {
        text.bytes().map(|character| Cell { character, colour }).collect()
    }

    /// The pixels that do not show the background, by line.
    fn written(buffer: &[u8], info: &FrameBufferInfo, background: &[u8]) -> Vec<(usize, usize)> {
        let pixels = buffer.chunks_exact(info.bytes_per_pixel).enumerate();
        let written = pixels.filter(|(_, pixel)| *pixel != background);
        written.map(|(at, _)| (at % info.stride, at / info.stride)).collect()
    }

    #[test]
    fn characters_appear_where_they_belong_in_every_shape() {
        for (width, height, stride, bytes) in [
            (640, 480, 640, 4),
            (640, 480, 700, 3),
            (801, 603, 832, 4),
            (1366, 768, 1376, 3),
            (1920, 1080, 1920, 4),
            (3840, 2160, 3840, 4),
        ] {
            let info = info(width, height, stride, bytes);
            let mut buffer = vec![0xaa; info.byte_len];
            let mut pixels = Pixels::new(&mut buffer, info).unwrap();
            pixels.clear();
            let (columns, rows) = pixels.size();
            let glyph = pixels.glyph;
            let (left, top) = pixels.place(columns - 2, rows - 1);
            assert!((columns + 1) * glyph.0 <= width && rows * glyph.1 + glyph.0 <= height);
            assert!((columns, rows) == (MAX_COLUMNS, rows) || (columns + 2) * glyph.0 > width);
            pixels.draw(columns - 2, rows - 1, &cells("Ag", Colour::Error));
            let background = [BACKGROUND[2], BACKGROUND[1], BACKGROUND[0], 0];
            let written = written(&buffer, &info, &background[..bytes]);
            assert!(written.len() > 30, "{}", written.len());
            let within = |&(x, y): &(usize, usize)| {
                (left..left + 2 * glyph.0).contains(&x) && (top..top + glyph.1).contains(&y)
            };
            assert!(written.iter().all(within), "{width} by {height}");
        }
    }

    #[test]
    fn a_character_is_as_its_colour_says_wherever_red_is() {
        let red_of = |format, bytes| {
            let info = FrameBufferInfo { pixel_format: format, ..info(640, 480, 640, bytes) };
            let mut buffer = vec![0; info.byte_len];
            let mut pixels = Pixels::new(&mut buffer, info).unwrap();
            pixels.draw(0, 0, &cells("MW@|_#=", Colour::Error));
            let full: Vec<u8> = buffer
                .chunks_exact(bytes)
                .max_by_key(|pixel| pixel.iter().map(|part| u32::from(*part)).sum::<u32>())
                .unwrap()
                .to_vec();
            full
        };
        let [red, green, blue] = colours(Colour::Error).0;
        assert_eq!(red_of(PixelFormat::Rgb, 3), [red, green, blue]);
        assert_eq!(red_of(PixelFormat::Bgr, 4), [blue, green, red, 0]);
        let unknown =
            PixelFormat::Unknown { red_position: 8, green_position: 16, blue_position: 24 };
        assert_eq!(red_of(unknown, 4), [0, red, green, blue]);
    }

    #[test]
    fn empty_cells_show_their_background() {
        let info = info(640, 480, 640, 4);
        let mut buffer = vec![0; info.byte_len];
        let mut pixels = Pixels::new(&mut buffer, info).unwrap();
        pixels.draw(0, 0, &[Cell { character: 0, colour: Colour::Title }]);
        let (glyph, edge) = (pixels.glyph, pixels.edge);
        let [red, green, blue] = TITLE_BACKGROUND;
        let at = (edge * 640 + edge) * 4;
        assert_eq!(buffer[at..at + 4], [blue, green, red, 0]);
        let title = written(&buffer, &info, &[0; 4]);
        assert_eq!(title.len(), info.width * (glyph.1 + 2 * edge));
    }

    #[test]
    fn what_cannot_be_drawn_on_is_refused() {
        let refused = |info: FrameBufferInfo, length: usize| {
            Pixels::new(&mut vec![0; length], info).is_none()
        };
        let good = info(640, 480, 640, 4);
        let length = good.byte_len;
        assert!(!refused(good, length) && refused(good, length - 1));
        assert!(refused(FrameBufferInfo { pixel_format: PixelFormat::U8, ..good }, length));
        assert!(refused(FrameBufferInfo { bytes_per_pixel: 2, ..good }, length));
        assert!(refused(FrameBufferInfo { bytes_per_pixel: 0, ..good }, length));
        assert!(refused(FrameBufferInfo { stride: 639, ..good }, length));
        assert!(refused(FrameBufferInfo { stride: usize::MAX, ..good }, length));
        assert!(refused(FrameBufferInfo { height: 100, ..good }, length));
        assert!(refused(FrameBufferInfo { width: 100, ..good }, length));
        let outside =
            PixelFormat::Unknown { red_position: 0, green_position: 8, blue_position: 25 };
        assert!(refused(FrameBufferInfo { pixel_format: outside, ..good }, length));
    }
}
