//! The screen: text in colours, on a framebuffer or in VGA text mode.
//!
//! What it shows stands in memory ([`grid`]); the screen itself is only written.

mod grid;
mod pixels;
mod text;

use core::fmt::{self, Write};

use bootloader_api::info::FrameBuffer;
use spin::{Mutex, MutexGuard};

use grid::{Cells, Grid};
use pixels::Pixels;
use text::TextMode;

/// What a text is, which decides how it looks.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Colour {
    /// Anything.
    #[default]
    Text,
    /// The first line.
    Title,
    /// Something has failed.
    Error,
    /// Something may not be as it should.
    Warning,
    /// Something is as it should.
    Good,
    /// The name of a guest.
    Guest,
    /// A heading.
    Heading,
    /// Less than anything.
    Faint,
}

impl Colour {
    /// How many there are.
    const COUNT: usize = 8;
    /// All of them, in order.
    const ALL: [Self; Self::COUNT] = [
        Self::Text,
        Self::Title,
        Self::Error,
        Self::Warning,
        Self::Good,
        Self::Guest,
        Self::Heading,
        Self::Faint,
    ];
}

/// Where characters appear.
trait Surface {
    /// Draws `cells` side by side, the first one at this column and row.
    fn draw(&mut self, column: usize, row: usize, cells: &[grid::Cell]);
}

/// What the one screen shows.
static CELLS: Mutex<Cells> = Mutex::new(Cells::EMPTY);

/// The screen of the machine, or nothing where there is none.
pub struct Screen(Option<Shown>);

struct Shown {
    grid: Grid<'static>,
    output: Output,
}

#[expect(clippy::large_enum_variant, reason = "there is one, and it is moved once")]
enum Output {
    Pixels(Pixels<'static>),
    Text(TextMode),
}

impl Screen {
    /// No screen.
    pub const fn none() -> Self {
        Self(None)
    }

    /// The screen behind a framebuffer; none if that is of an unknown kind.
    pub fn of_framebuffer(framebuffer: FrameBuffer) -> Self {
        let info = framebuffer.info();
        let Some(mut pixels) = Pixels::new(framebuffer.into_buffer(), info) else {
            return Self::none();
        };
        pixels.clear();
        let size = pixels.size();
        Self::new(size, Output::Pixels(pixels))
    }

    /// The screen in VGA's text mode.
    ///
    /// # Safety
    ///
    /// The machine has booted by a BIOS, which has left the screen in text mode, and nothing else
    /// writes to it.
    pub unsafe fn of_text_mode() -> Self {
        // SAFETY: the caller's obligation.
        let text = unsafe { TextMode::new() };
        let mut screen = Self::new((text::COLUMNS, text::ROWS), Output::Text(text));
        if let Some(shown) = &mut screen.0 {
            shown.grid.forget_drawn();
        }
        screen
    }

    /// The first screen; a second one does not exist.
    fn new((columns, rows): (usize, usize), output: Output) -> Self {
        let cells = CELLS.try_lock().map(MutexGuard::leak);
        Self(cells.map(|cells| Shown { grid: Grid::new(cells, columns, rows), output }))
    }

    /// Whether anybody can see it.
    pub fn exists(&self) -> bool {
        self.0.is_some()
    }

    /// Columns and rows.
    pub fn size(&self) -> (usize, usize) {
        self.0.as_ref().map_or((0, 0), |shown| shown.grid.size())
    }

    /// Writes text: what comes after a line end begins a new line.
    pub fn write(&mut self, colour: Colour, text: impl fmt::Display) {
        if let Some(Shown { grid, .. }) = &mut self.0 {
            // The grid takes everything.
            let _ = write!(Pen { grid, colour }, "{text}");
        }
    }

    /// Ends the line and shows what was written.
    pub fn end_line(&mut self) {
        if let Some(shown) = &mut self.0 {
            shown.grid.end_line();
            shown.draw();
        }
    }

    /// Writes the first row, which stays where it is from now on.
    pub fn title(&mut self, text: impl fmt::Display) {
        if let Some(shown) = &mut self.0 {
            shown.grid.begin_title();
            let _ = write!(Pen { grid: &mut shown.grid, colour: Colour::Title }, "{text}");
            shown.grid.end_title();
            shown.draw();
        }
    }

    /// Makes all rows empty but the title; nothing changes on the screen before the next line.
    pub fn clear(&mut self) {
        if let Some(shown) = &mut self.0 {
            shown.grid.clear();
        }
    }
}

impl Shown {
    fn draw(&mut self) {
        match &mut self.output {
            Output::Pixels(pixels) => self.grid.draw(pixels),
            Output::Text(text) => self.grid.draw(text),
        }
    }
}

struct Pen<'a> {
    grid: &'a mut Grid<'static>,
    colour: Colour,
}

impl Write for Pen<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().for_each(|character| self.grid.put(self.colour, character));
        Ok(())
    }
}
