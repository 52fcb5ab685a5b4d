//! VGA's text mode, as a BIOS leaves it.

use vmx::addr::HostPhysAddr;
use x86_64::instructions::port::Port;

use super::grid::Cell;
use super::{Colour, Surface};
use crate::memory;

/// Size in characters.
pub const COLUMNS: usize = 80;
pub const ROWS: usize = 25;

/// Where the characters are, two bytes each: code and attribute.
const BUFFER: HostPhysAddr = HostPhysAddr::new_truncate(0xb8000);

/// The text buffer.
pub struct TextMode(());

impl TextMode {
    /// Takes it over and hides the cursor.
    ///
    /// # Safety
    ///
    /// The screen is in text mode, and nothing else writes to it.
    pub unsafe fn new() -> Self {
        /// The CRT controller's index and data, its register "cursor start", and the bit of it that
        /// switches the cursor off.
        const INDEX: u16 = 0x3d4;
        const CURSOR_START: u8 = 0x0a;
        const CURSOR_OFF: u8 = 1 << 5;
        // SAFETY: the caller's obligation.
        unsafe {
            Port::<u8>::new(INDEX).write(CURSOR_START);
            Port::<u8>::new(INDEX + 1).write(CURSOR_OFF);
        }
        Self(())
    }

    /// Background in bits 6:4, foreground in bits 3:0.
    const fn attribute(colour: Colour) -> u8 {
        match colour {
            Colour::Text => 0x07,
            Colour::Title => 0x1f,
            Colour::Error => 0x0c,
            Colour::Warning => 0x0e,
            Colour::Good => 0x0a,
            Colour::Guest => 0x0b,
            Colour::Heading => 0x0f,
            Colour::Faint => 0x08,
        }
    }
}

impl Surface for TextMode {
    fn draw(&mut self, column: usize, row: usize, cells: &[Cell]) {
        let places = (row * COLUMNS + column..COLUMNS * ROWS).take(cells.len());
        for (place, cell) in places.zip(cells) {
            let character = if cell.character == 0 { b' ' } else { cell.character };
            let code = u16::from(Self::attribute(cell.colour)) << 8 | u16::from(character);
            // SAFETY: (1) the loader maps all below 4 GiB; (2) `place` is within the buffer, which
            // is a device's and no memory of anybody; (3) `new` says that it is there.
            unsafe { memory::to_virtual::<u16>(BUFFER).add(place).write_volatile(code) };
        }
    }
}
