//! What people see: serial ports, the screen, and the log that outlives a restart.
//!
//! One lock for all three, held for a line: lines of several CPUs do not mix, and are in the same
//! order everywhere.

use core::fmt::{self, Write};

use arrayvec::ArrayVec;
use log::Level;
use spin::Mutex;

use crate::screen::{Colour, Screen};
use crate::serial::{LogPorts, Ports};

/// What is logged before there is a place to keep it, in bytes.
const EARLY: usize = 4096;

static CONSOLE: Mutex<Console> = Mutex::new(Console {
    ports: Ports::none(),
    screen: Screen::none(),
    kept: Kept::Early(ArrayVec::new_const()),
    is_typing: false,
});

/// All that people see.
pub struct Console {
    ports: LogPorts,
    /// The screen.
    pub screen: Screen,
    kept: Kept,
    /// On the serial ports, the cursor stands behind what somebody types.
    is_typing: bool,
}

/// The log that outlives a restart.
#[expect(clippy::large_enum_variant, reason = "there is one, and it is moved once")]
enum Kept {
    /// There is no place for it yet.
    Early(ArrayVec<u8, EARLY>),
    Log(boot::log::Log<'static>, Lines),
    /// There is no place for it.
    None,
}

/// Gives `write` all of it for as long as it takes.
pub fn with<R>(write: impl FnOnce(&mut Console) -> R) -> R {
    write(&mut CONSOLE.lock())
}

/// The same if nobody else has it; `None` if somebody has.
pub fn try_with<R>(write: impl FnOnce(&mut Console) -> R) -> Option<R> {
    Some(write(&mut *CONSOLE.try_lock()?))
}

/// Takes it away from whoever holds it.
///
/// # Safety
///
/// Nobody will go on with it: in a panic.
pub unsafe fn break_lock() {
    // SAFETY: the caller's obligation.
    unsafe { CONSOLE.force_unlock() };
}

impl Console {
    /// Uses these ports from now on.
    pub fn use_ports(&mut self, ports: LogPorts) {
        self.ports = ports;
    }

    /// Keeps the log in `area` from now on, with what was logged before. Without an area, or if it
    /// is too small, nothing is kept.
    pub fn keep(&mut self, area: Option<&'static mut [u8]>) {
        let early = core::mem::replace(&mut self.kept, Kept::None);
        let Some(area) = area else { return };
        let lines = Lines::of(area);
        let Some(log) = boot::log::Log::begin(area) else { return };
        self.kept = Kept::Log(log, lines);
        if let Kept::Early(early) = early {
            self.kept.append(&early);
        }
    }

    /// Whether the log outlives a restart.
    pub fn is_kept(&self) -> bool {
        matches!(self.kept, Kept::Log(..))
    }

    /// The first line of all.
    pub fn title(&mut self, text: fmt::Arguments<'_>) {
        self.screen.title(text);
        self.write_unseen(text);
    }

    /// A line of the log. What is of level "debug" is only kept, not shown.
    pub fn log(&mut self, level: Level, text: fmt::Arguments<'_>) {
        let (label, colour) = match level {
            Level::Error => ("ERROR ", Colour::Error),
            Level::Warn => ("WARN  ", Colour::Warning),
            Level::Info => ("", Colour::Text),
            Level::Debug | Level::Trace => {
                let _ = writeln!(Clean(&mut self.kept), "{text}");
                return;
            }
        };
        self.write_unseen(format_args!("{label}{text}"));
        self.write_screen(colour, format_args!("{label}{text}"));
    }

    /// A line of a guest's output: not kept, since a guest may write without end.
    pub fn guest(&mut self, name: &str, text: &str) {
        self.end_typing();
        let _ = writeln!(Clean(&mut self.ports), "[{name}] {text}");
        self.screen.write(Colour::Guest, format_args!("[{name}]"));
        self.screen.write(Colour::Text, format_args!(" {text}"));
        self.screen.end_line();
    }

    /// A line for the serial ports and the log that is kept.
    pub fn write_unseen(&mut self, text: fmt::Arguments<'_>) {
        self.end_typing();
        // Ports and log take everything, and what is printed has no failing formatters.
        let _ = writeln!(Clean(&mut self.ports), "{text}");
        let _ = writeln!(Clean(&mut self.kept), "{text}");
    }

    /// A line for the screen.
    pub fn write_screen(&mut self, colour: Colour, text: fmt::Arguments<'_>) {
        self.screen.write(colour, text);
        self.screen.end_line();
    }

    /// Takes what has come in on the serial ports, `room` bytes at most.
    pub fn receive(&mut self, room: usize, take: impl FnMut(u8)) {
        self.ports.receive(room, take);
    }

    /// Whether a line that is being typed stands on the serial ports, and nothing after it.
    pub fn is_typing(&self) -> bool {
        self.is_typing
    }

    /// Shows what is being typed, where it is being typed.
    pub fn typing(&mut self, text: &str) {
        let _ = self.ports.write_str(text);
        self.is_typing = true;
    }

    /// A line that was typed is complete.
    pub fn typed(&mut self, text: fmt::Arguments<'_>) {
        if self.is_typing {
            self.end_typing();
        } else {
            let _ = writeln!(Clean(&mut self.ports), "{text}");
        }
        let _ = writeln!(Clean(&mut self.kept), "{text}");
        self.write_screen(Colour::Text, text);
    }

    /// A line of the answer.
    pub fn answer(&mut self, line: &str) {
        self.write_unseen(format_args!("{line}"));
        self.write_screen(Colour::Text, format_args!("{line}"));
    }

    /// What comes next begins on a line of its own.
    fn end_typing(&mut self) {
        if core::mem::take(&mut self.is_typing) {
            let _ = self.ports.write_str("\r\n");
        }
    }

    /// Waits until everything is out.
    pub fn flush(&mut self) {
        self.ports.flush();
    }
}

/// Somewhere that text goes.
trait Sink {
    /// How a line ends there.
    const LINE_END: &str;

    fn take(&mut self, text: &str);
}

impl Sink for LogPorts {
    const LINE_END: &str = "\r\n";

    fn take(&mut self, text: &str) {
        let _ = self.write_str(text);
    }
}

impl Sink for Kept {
    const LINE_END: &str = "\n";

    fn take(&mut self, text: &str) {
        self.append(text.as_bytes());
    }
}

impl Kept {
    fn append(&mut self, text: &[u8]) {
        match self {
            Self::Early(early) => {
                let room = text.len().min(early.remaining_capacity());
                early.extend(text[..room].iter().copied());
            }
            Self::Log(log, lines) => {
                log.append(text);
                lines.write_back(text.len());
            }
            Self::None => {}
        }
    }
}

/// Text without control characters: what comes from a file of the operator's or from a guest moves
/// no cursor.
struct Clean<'a, S: Sink>(&'a mut S);

impl<S: Sink> Write for Clean<'_, S> {
    fn write_str(&mut self, mut text: &str) -> fmt::Result {
        let is_control = |c: char| c.is_control() && c != '\t';
        while let Some(at) = text.find(is_control) {
            let (before, rest) = text.split_at(at);
            let mut rest = rest.chars();
            self.0.take(before);
            self.0.take(if rest.next() == Some('\n') { S::LINE_END } else { "." });
            text = rest.as_str();
        }
        self.0.take(text);
        Ok(())
    }
}

/// The cache lines of the area in which the log is kept. They are written back with each line of
/// the log: a restart that nobody has asked for does not do that.
struct Lines {
    area: *const u8,
    bytes: usize,
    /// How much text is there.
    used: usize,
}

// SAFETY: the pointer is only used for an instruction that changes no memory.
unsafe impl Send for Lines {}

impl Lines {
    /// Size of a cache line.
    const LINE: usize = 64;

    fn of(area: &[u8]) -> Self {
        Self { area: area.as_ptr(), bytes: area.len(), used: 0 }
    }

    /// So many bytes of text were added.
    fn write_back(&mut self, added: usize) {
        let start = self.used;
        self.used = (start + added).min(self.bytes);
        // The head is in the first line; the text begins behind it.
        let text = (start..self.used + 2 * Self::LINE).step_by(Self::LINE);
        for at in text.chain([0]).filter(|at| *at < self.bytes) {
            // SAFETY: within the area, which is mapped; CLFLUSH exists on every x86-64 CPU.
            unsafe { core::arch::x86_64::_mm_clflush(self.area.add(at)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::String;
    use std::{boxed::Box, vec};

    #[derive(Default)]
    struct Paper(String);

    impl Sink for Paper {
        const LINE_END: &str = "|";

        fn take(&mut self, text: &str) {
            self.0 += text;
        }
    }

    #[test]
    fn control_characters_do_nothing() {
        let mut paper = Paper::default();
        write!(Clean(&mut paper), "\u{1b}[2Ja\tb\n\nc\r\u{7}é\u{9b}\n").unwrap();
        assert_eq!(paper.0, ".[2Ja\tb||c..é.|");
    }

    #[test]
    fn what_was_logged_before_there_was_a_place_is_kept_too() {
        let area: &'static mut [u8] = Box::leak(vec![0; 1000].into_boxed_slice());
        let (start, length) = (area.as_ptr(), area.len());
        let mut console = Console {
            ports: Ports::none(),
            screen: Screen::none(),
            kept: Kept::Early(ArrayVec::new()),
            is_typing: false,
        };
        console.title(format_args!("title"));
        console.log(Level::Error, format_args!("early"));
        console.log(Level::Debug, format_args!("detail"));
        console.guest("name", "line");
        console.keep(Some(area));
        assert!(console.is_kept());
        console.log(Level::Info, format_args!("late\x07"));
        // SAFETY: the console holds the area, and does nothing with it now.
        let area = unsafe { core::slice::from_raw_parts(start, length) };
        let text = boot::log::text(area).unwrap();
        assert_eq!(core::str::from_utf8(text), Ok("title\nERROR early\ndetail\nlate.\n"));
    }

    #[test]
    fn more_than_there_is_room_for_is_cut() {
        let mut kept = Kept::Early(ArrayVec::new());
        kept.append(&[b'x'; EARLY - 2]);
        kept.append(b"abcd");
        kept.append(b"e");
        let Kept::Early(early) = &kept else { panic!("it is early") };
        assert!(early.ends_with(b"xab"));
        let area: &'static mut [u8] = Box::leak(vec![0; 300].into_boxed_slice());
        let mut lines = Lines::of(area);
        for _ in 0..100 {
            lines.write_back(99);
        }
        assert_eq!(lines.used, 300);
        let mut console =
            Console { ports: Ports::none(), screen: Screen::none(), kept, is_typing: false };
        console.keep(None);
        assert!(!console.is_kept());
    }
}
