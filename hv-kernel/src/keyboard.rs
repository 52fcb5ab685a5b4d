//! The keyboard, as far as it takes to wait for a key: an i8042 controller, polled.
//!
//! On many machines the firmware makes a USB keyboard appear as one.

use x86_64::instructions::port::Port;

/// Data, and status (read) or command (written).
const DATA: u16 = 0x60;
const STATUS: u16 = 0x64;

/// Status: there is something to read.
const OUTPUT_FULL: u8 = 1 << 0;
/// Status: what was written is not taken yet.
const INPUT_FULL: u8 = 1 << 1;
/// Status: what is to be read is a mouse's.
const FROM_MOUSE: u8 = 1 << 5;

/// Command: switch the keyboard's port on.
const ENABLE_PORT: u8 = 0xae;
/// To the keyboard: send keys.
const ENABLE_KEYS: u8 = 0xf4;
/// Command: pulse the reset line.
const PULSE_RESET: u8 = 0xfe;

/// How often the status is read before a controller is given up.
const PATIENCE: u32 = 10_000;
/// More than a controller and a keyboard hold back.
const BUFFERED: u32 = 64;

/// A keyboard that may be there.
pub struct Keyboard {
    decoder: Decoder,
}

impl Keyboard {
    /// The keyboard, switched on, with all that was typed before forgotten. `None` without a
    /// controller.
    pub fn find() -> Option<Self> {
        let status = read(STATUS);
        (status != 0xff).then_some(())?;
        write(STATUS, ENABLE_PORT);
        write(DATA, ENABLE_KEYS);
        let mut keyboard = Self { decoder: Decoder::default() };
        for _ in 0..BUFFERED {
            keyboard.poll();
        }
        Some(keyboard)
    }

    /// Whether a key was pressed since the last time. Reads one byte at most.
    pub fn poll(&mut self) -> bool {
        let status = read(STATUS);
        if status & OUTPUT_FULL == 0 || status == 0xff {
            return false;
        }
        let byte = read(DATA);
        status & FROM_MOUSE == 0 && self.decoder.is_press(byte)
    }
}

/// Asks the controller to reset the machine.
pub fn reset_machine() {
    write(STATUS, PULSE_RESET);
}

fn read(port: u16) -> u8 {
    // SAFETY: the controller's ports; reading takes what nobody else asks for.
    unsafe { Port::new(port).read() }
}

/// Writes once the controller can take it, or after some time in any case.
fn write(port: u16, value: u8) {
    for _ in 0..PATIENCE {
        if read(STATUS) & INPUT_FULL == 0 {
            break;
        }
        core::hint::spin_loop();
    }
    // SAFETY: the controller's ports, and commands that do what the caller wants.
    unsafe { Port::new(port).write(value) };
}

/// Tells keys that are pressed from all else that a keyboard sends, in both codes that are in use:
/// set 1, which controllers translate to, and set 2, which keyboards send.
#[derive(Debug, Default)]
struct Decoder {
    /// The next byte is a key that is released.
    released: bool,
}

impl Decoder {
    /// Before a key that is released, in set 2.
    const RELEASE: u8 = 0xf0;
    /// Set on a key that is released, in set 1; also on prefixes and answers to commands.
    const NOT_PRESSED: u8 = 1 << 7;

    fn is_press(&mut self, byte: u8) -> bool {
        let released = core::mem::replace(&mut self.released, byte == Self::RELEASE);
        !released && byte != 0 && byte & Self::NOT_PRESSED == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presses(bytes: &[u8]) -> usize {
        let mut decoder = Decoder::default();
        bytes.iter().filter(|byte| decoder.is_press(**byte)).count()
    }

    #[test]
    fn only_keys_that_are_pressed_count() {
        // Enter, in set 1 and in set 2.
        assert_eq!(presses(&[0x1c]), 1);
        assert_eq!(presses(&[0x9c]), 0);
        assert_eq!(presses(&[0x1c, 0x9c]), 1);
        assert_eq!(presses(&[0x5a]), 1);
        assert_eq!(presses(&[0xf0, 0x5a]), 0);
        assert_eq!(presses(&[0x5a, 0xf0, 0x5a, 0x5a]), 2);
        // Cursor keys have a prefix.
        assert_eq!(presses(&[0xe0, 0x48]), 1);
        assert_eq!(presses(&[0xe0, 0xc8]), 0);
        assert_eq!(presses(&[0xe0, 0xf0, 0x75]), 0);
        // An answer, the result of a self test, an overrun.
        assert_eq!(presses(&[0xfa, 0xaa, 0xfe, 0xee, 0x00, 0xff]), 0);
    }
}
