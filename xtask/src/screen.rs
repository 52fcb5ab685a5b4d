//! Reads the text on a picture of the screen, as the kernel draws it.
//!
//! The kernel draws glyphs of the crate `noto-sans-mono-bitmap` side by side, in any colour. A glyph is known by its
//! shape: how much of the way from the background's colour to the strongest one in its cell each pixel goes.

use std::fmt;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

/// Red, green and blue.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Colour(pub [u8; 3]);

impl fmt::Debug for Colour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [red, green, blue] = self.0;
        write!(f, "#{red:02x}{green:02x}{blue:02x}")
    }
}

impl Colour {
    /// Whether people call it red.
    pub fn is_red(self) -> bool {
        let [red, green, blue] = self.0.map(u32::from);
        red > 128 && red > green * 3 / 2 && red > blue * 3 / 2
    }
}

/// What a screen shows.
#[derive(Clone, Debug)]
pub struct Picture {
    width: usize,
    pixels: Vec<Colour>,
}

/// What the kernel draws with.
const WEIGHT: FontWeight = FontWeight::Regular;
const RASTER: RasterHeight = RasterHeight::Size16;
/// Size of a cell.
const HEIGHT: usize = RASTER as usize;
const WIDTH: usize = get_raster_width(WEIGHT, RASTER);
/// How much a cell may differ from a glyph: 8 of 255 on average. Colours that are close to the background's have few
/// steps.
const MAX_DIFFERENCE: usize = 8 * WIDTH * HEIGHT;
/// Stands for what is no character of the font.
const UNKNOWN: char = char::REPLACEMENT_CHARACTER;

impl Picture {
    /// Reads a portable pixmap (P6) of 8 bits a channel.
    ///
    /// # Errors
    /// If it is something else, or not complete.
    pub fn from_ppm(bytes: &[u8]) -> Result<Self> {
        let mut rest = bytes;
        // Magic, width, height, greatest value; each ends with one white space, and there are no comments.
        let mut field = || -> Option<&[u8]> {
            let end = rest.iter().position(u8::is_ascii_whitespace)?;
            let (field, behind) = rest.split_at(end);
            rest = &behind[1..];
            Some(field)
        };
        let magic = field();
        ensure!(magic == Some(b"P6"), "the picture is no portable pixmap");
        let mut number = || std::str::from_utf8(field()?).ok()?.parse::<usize>().ok();
        let numbers = [number(), number(), number()];
        let [Some(width @ 1..), Some(height @ 1..), Some(255)] = numbers else {
            bail!("the picture has an odd header: {numbers:?}");
        };
        let (pixels, _) = rest.as_chunks::<3>();
        let pixels: Vec<_> = pixels.iter().copied().map(Colour).collect();
        let whole = width.checked_mul(height).context("the picture is too large")?;
        ensure!(pixels.len() == whole, "the picture is cut off");
        Ok(Self { width, pixels })
    }

    /// Width and height in pixels.
    pub fn size(&self) -> (usize, usize) {
        (self.width, self.pixels.len() / self.width)
    }

    /// Whether it has one colour only.
    pub fn is_blank(&self) -> bool {
        self.pixels.iter().all(|pixel| *pixel == self.pixels[0])
    }

    fn row(&self, y: usize) -> &[Colour] {
        &self.pixels[y * self.width..][..self.width]
    }

    /// Reads the text on it. Rows of text may begin anywhere and have any distance; those without text are left out.
    pub fn text(&self) -> Text {
        let mut text = Text { lines: Vec::new() };
        let (_, height) = self.size();
        let background = self.background();
        let mut left = None;
        let mut free = 0;
        while let Some(ink) =
            (free..height).find(|y| self.row(*y).iter().any(|pixel| *pixel != background))
        {
            // The row begins somewhere above its topmost ink, where it can be read best; the first one says where the
            // columns are.
            let tops = ink.saturating_sub(HEIGHT - 1).max(free)..=ink.min(height - 1);
            let tops = tops.filter(|top| top + HEIGHT <= height);
            let lefts = match left {
                Some(left) => left..left + 1,
                None => 0..WIDTH,
            };
            let places = tops.flat_map(|top| lefts.clone().map(move |left| (left, top)));
            let readings = places.map(|place| (self.read_row(place), place));
            let Some((line, (x, y))) = readings.max_by_key(|(line, _)| line.score()) else { break };
            free = y + HEIGHT;
            if line.score() > 0 {
                left = Some(x);
                text.lines.push(line);
            }
        }
        text
    }

    /// The most frequent colour.
    fn background(&self) -> Colour {
        most_frequent(self.pixels.iter().step_by(7).copied())
    }

    /// Reads the cells of a row from this place to the right edge.
    fn read_row(&self, (left, top): (usize, usize)) -> Line {
        let columns = (self.width - left) / WIDTH;
        let cells = (0..columns).map(|column| {
            let x = left + column * WIDTH;
            let rows = (top..top + HEIGHT).flat_map(|y| &self.row(y)[x..x + WIDTH]);
            read_cell(&rows.copied().collect::<Vec<_>>())
        });
        let mut cells: Vec<Cell> = cells.collect();
        let end = cells.iter().rposition(|cell| cell.character != ' ').map_or(0, |last| last + 1);
        cells.truncate(end);
        Line { cells }
    }
}

/// The text on a screen.
#[derive(Clone, Debug)]
pub struct Text {
    /// Its lines, from top to bottom, without those that are empty.
    pub lines: Vec<Line>,
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

impl Text {
    /// All characters as if no line had been broken, and how they are coloured. Spaces at line ends are lost.
    pub fn unbroken(&self) -> Line {
        Line { cells: self.lines.iter().flat_map(|line| &line.cells).copied().collect() }
    }

    /// The colours in which this stands somewhere, each time that it does.
    pub fn colours_of(&self, text: &str) -> Vec<Colour> {
        self.lines.iter().flat_map(|line| line.colours_of(text)).collect()
    }
}

/// A line of text.
#[derive(Clone, Debug)]
pub struct Line {
    cells: Vec<Cell>,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cells.iter().try_for_each(|cell| write!(f, "{}", cell.character))
    }
}

impl Line {
    /// The colours in which this stands there, each time that it does: of each the colour of its clearest character.
    pub fn colours_of(&self, text: &str) -> Vec<Colour> {
        let wanted: Vec<char> = text.chars().collect();
        let places = self
            .cells
            .windows(wanted.len().max(1))
            .filter(|cells| cells.iter().map(|cell| cell.character).eq(wanted.iter().copied()));
        let clearest =
            |cells: &[Cell]| cells.iter().max_by_key(|cell| cell.strength).map(|cell| cell.colour);
        places.filter_map(clearest).collect()
    }

    /// The greater the more was read, and the more clearly.
    fn score(&self) -> i64 {
        let of = |cell: &Cell| match cell.character {
            ' ' => 0,
            UNKNOWN => -(MAX_DIFFERENCE as i64),
            // A stop at one place looks like a dash at another, a little.
            _ => 2 * MAX_DIFFERENCE as i64 - cell.difference as i64,
        };
        self.cells.iter().map(of).sum()
    }
}

/// A character on the screen.
#[derive(Clone, Copy, Debug)]
struct Cell {
    character: char,
    colour: Colour,
    /// The greatest intensity in its glyph: how well its colour is known.
    strength: u8,
    /// How much it differs from the glyph, summed up over its pixels.
    difference: usize,
}

/// A character's shape: each pixel's intensity, its strongest pixel's being 255.
struct Shape {
    character: char,
    strength: u8,
    pixels: Vec<u8>,
    outline: u128,
}

/// Which pixels have at least half of the full intensity: tells quickly what is not alike.
fn outline(pixels: &[u8]) -> u128 {
    const { assert!(WIDTH * HEIGHT <= 128) };
    pixels.iter().fold(0, |outline, pixel| outline << 1 | u128::from(*pixel >= 128))
}

fn shapes() -> &'static [Shape] {
    static SHAPES: OnceLock<Vec<Shape>> = OnceLock::new();
    SHAPES.get_or_init(|| {
        let graphic = (b'!'..=b'~').map(char::from);
        let shape = |character| {
            let pixels = get_raster(character, WEIGHT, RASTER)?.pixels();
            let strength = *pixels.iter().max()?;
            let normal = |pixel: &u8| (u32::from(*pixel) * 255 / u32::from(strength.max(1))) as u8;
            let pixels: Vec<u8> = pixels.iter().map(normal).collect();
            Some(Shape { character, strength, outline: outline(&pixels), pixels })
        };
        graphic.filter_map(shape).collect()
    })
}

/// Finds out which character a cell shows.
fn read_cell(pixels: &[Colour]) -> Cell {
    let blank = |colour| Cell { character: ' ', colour, strength: 0, difference: 0 };
    if pixels.iter().all(|pixel| *pixel == pixels[0]) {
        return blank(pixels[0]);
    }
    /// Outlines of the same glyph do not differ in so many pixels.
    const UNLIKE: u32 = 12;

    // No glyph covers half of its cell.
    let background = most_frequent(pixels.iter().copied());
    let steps = |pixel: Colour| -> [i32; 3] {
        std::array::from_fn(|channel| {
            i32::from(pixel.0[channel]) - i32::from(background.0[channel])
        })
    };
    let product = |a: [i32; 3], b: [i32; 3]| a.iter().zip(b).map(|(a, b)| a * b).sum::<i32>();
    let strongest = pixels.iter().map(|pixel| steps(*pixel)).max_by_key(|way| product(*way, *way));
    let strongest = strongest.unwrap_or_default();
    let length = product(strongest, strongest);
    let intensity =
        |pixel: &Colour| (product(steps(*pixel), strongest) * 255 / length).clamp(0, 255) as u8;
    let seen: Vec<u8> = pixels.iter().map(intensity).collect();
    let difference = |shape: &Shape| {
        let pairs = shape.pixels.iter().zip(&seen);
        pairs.map(|(a, b)| usize::from(a.abs_diff(*b))).sum::<usize>()
    };
    let outline = outline(&seen);
    let alike = shapes().iter().filter(|shape| (shape.outline ^ outline).count_ones() <= UNLIKE);
    let closest = alike.map(|shape| (difference(shape), shape));
    let closest = closest.min_by_key(|(difference, _)| *difference);
    let (character, strength, difference) = match closest {
        Some((difference, shape)) if difference <= MAX_DIFFERENCE => {
            (shape.character, shape.strength, difference)
        }
        _ => (UNKNOWN, u8::MAX, MAX_DIFFERENCE),
    };
    let full = |channel| {
        let step: i32 = strongest[channel] * 255 / i32::from(strength.max(1));
        (i32::from(background.0[channel]) + step).clamp(0, 255) as u8
    };
    Cell { character, colour: Colour(std::array::from_fn(full)), strength, difference }
}

fn most_frequent(colours: impl Iterator<Item = Colour>) -> Colour {
    let mut colours: Vec<[u8; 3]> = colours.map(|colour| colour.0).collect();
    colours.sort_unstable();
    let groups = colours.chunk_by(|a, b| a == b).max_by_key(|group| group.len());
    Colour(groups.map_or([0; 3], |group| group[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DARK: [u8; 3] = [16, 20, 32];
    const GREY: [u8; 3] = [200, 200, 200];
    const RED: [u8; 3] = [255, 96, 96];

    /// A screen to draw on.
    struct Canvas {
        width: usize,
        height: usize,
        pixels: Vec<[u8; 3]>,
    }

    impl Canvas {
        fn new(width: usize, height: usize) -> Self {
            Self { width, height, pixels: vec![DARK; width * height] }
        }

        fn write(&mut self, place: (usize, usize), text: &str, colour: [u8; 3]) {
            self.write_on(DARK, place, text, colour);
        }

        /// In 64 steps from the background to the colour, as the kernel draws.
        fn write_on(
            &mut self,
            background: [u8; 3],
            (x, y): (usize, usize),
            text: &str,
            colour: [u8; 3],
        ) {
            for (column, character) in text.chars().enumerate() {
                let glyph = get_raster(character, WEIGHT, RASTER).unwrap();
                for (dy, row) in glyph.rows().enumerate() {
                    for (dx, intensity) in row.iter().enumerate() {
                        let at = (y + dy) * self.width + x + column * WIDTH + dx;
                        let mix = |channel: usize| {
                            let [from, to] = [background[channel], colour[channel]].map(i32::from);
                            (from + (to - from) * i32::from(*intensity / 4) / 63) as u8
                        };
                        self.pixels[at] = std::array::from_fn(mix);
                    }
                }
            }
        }

        fn ppm(&self) -> Vec<u8> {
            let header = format!("P6\n{} {}\n255\n", self.width, self.height);
            [header.as_bytes(), self.pixels.as_flattened()].concat()
        }

        fn picture(&self) -> Picture {
            Picture::from_ppm(&self.ppm()).unwrap()
        }
    }

    #[test]
    fn every_character_is_read_back() {
        let all: String = (b' '..=b'~').map(char::from).collect();
        for colour in [GREY, RED, [90, 90, 100], [80, 220, 120]] {
            let mut canvas = Canvas::new(WIDTH * 100, HEIGHT);
            canvas.write((0, 0), &all, colour);
            let text = canvas.picture().text();
            assert_eq!(text.to_string(), format!("{all}\n"), "{colour:?}");
            let [found] = text.colours_of("MNO")[..] else { panic!() };
            let near = found.0.iter().zip(colour).all(|(a, b)| a.abs_diff(b) <= 4);
            assert!(near, "{found:?} is not {:?}", Colour(colour));
        }
    }

    #[test]
    fn lines_are_found_wherever_they_are() {
        for (left, top, pitch) in [(0, 0, HEIGHT), (3, 5, HEIGHT), (8, 8, HEIGHT + 3)] {
            let mut canvas = Canvas::new(WIDTH * 40 + 5, 10 * pitch);
            canvas.write((left, top), "...", GREY);
            canvas.write((left, top + pitch), "VM one: 8 MiB, policy warn", GREY);
            canvas.write((left + 4 * WIDTH, top + 4 * pitch), "no VT-x: ", RED);
            canvas.write((left + 13 * WIDTH, top + 4 * pitch), "enable it", GREY);
            let text = canvas.picture().text();
            let lines: Vec<_> =
                text.lines.iter().map(|line| line.to_string().trim().to_owned()).collect();
            let expected = ["...", "VM one: 8 MiB, policy warn", "no VT-x: enable it"];
            assert_eq!(lines, expected, "{left} {top} {pitch}");
            assert!(text.colours_of("no VT-x").iter().all(|colour| colour.is_red()));
            assert_eq!(text.colours_of("no VT-x").len(), 1);
            assert!(text.colours_of("enable it").iter().all(|colour| !colour.is_red()));
        }
    }

    #[test]
    fn a_title_on_a_bar_is_read() {
        let mut canvas = Canvas::new(WIDTH * 40 + 6, HEIGHT * 3 + 6);
        let title = format!("{:<40}", "Unsplit 0.1.0");
        canvas.write_on([30, 60, 95], (3, 3), &title, [255; 3]);
        canvas.write((3, 3 + HEIGHT), "split-lock detection: mode warn", GREY);
        let text = canvas.picture().text();
        assert_eq!(text.to_string(), "Unsplit 0.1.0\nsplit-lock detection: mode warn\n");
        assert_eq!(text.colours_of("Unsplit"), [Colour([255; 3])]);
    }

    #[test]
    fn a_full_screen_is_read() {
        let mut canvas = Canvas::new(1280, 800);
        let line = "split lock at RIP 0x1023e4, CPL 0 ".repeat(5);
        for row in 0..50 {
            canvas.write((0, row * HEIGHT), &line, GREY);
        }
        let text = canvas.picture().text();
        assert_eq!(text.lines.len(), 50);
        assert!(text.lines.iter().all(|read| read.to_string() == line.trim_end()), "{text}");
    }

    #[test]
    fn a_message_over_two_lines_is_found() {
        let mut canvas = Canvas::new(WIDTH * 10, HEIGHT * 2);
        canvas.write((0, 0), "without VT", RED);
        canvas.write((0, HEIGHT), "-x it does", RED);
        let text = canvas.picture().text();
        assert!(text.colours_of("VT-x").is_empty());
        assert_eq!(text.unbroken().colours_of("VT-x").len(), 1);
    }

    #[test]
    fn what_is_no_text_is_not_read_as_text() {
        let mut canvas = Canvas::new(WIDTH * 10, HEIGHT * 3);
        assert!(canvas.picture().is_blank());
        assert!(canvas.picture().text().lines.is_empty());
        for (index, pixel) in canvas.pixels.iter_mut().enumerate() {
            *pixel = if index % 3 == 0 { GREY } else { DARK };
        }
        let picture = canvas.picture();
        assert!(!picture.is_blank());
        let text = picture.text().to_string();
        assert!(!text.contains(|character: char| character.is_ascii_alphanumeric()), "{text}");
    }

    #[test]
    fn pictures_that_are_none_are_refused() {
        let good = Canvas::new(4, 2).ppm();
        assert_eq!(Picture::from_ppm(&good).unwrap().size(), (4, 2));
        assert!(Picture::from_ppm(&good[..good.len() - 1]).is_err());
        assert!(Picture::from_ppm(b"P5\n1 1\n255\n\0").is_err());
        assert!(Picture::from_ppm(b"P6\n1 1\n65535\n\0\0\0\0\0\0").is_err());
        assert!(Picture::from_ppm(b"P6\n0 0\n255\n").is_err());
        assert!(Picture::from_ppm(b"P6").is_err());
    }
}
