//! The terminal on which Bochs draws the machine's screen. Nobody looks at it, but somebody has to read it:
//! Bochs makes a pseudo-terminal for it, and stops in the middle of everything once that holds as much as it
//! can, after some hundred lines.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// What Bochs says before its path, in quotes. Not all builds make one.
const SAID: &str = "Bochs connected to screen \"";

/// The reading end.
pub(crate) struct Terminal {
    /// Where Bochs' output goes.
    output: PathBuf,
    file: Option<File>,
}

impl Terminal {
    /// That of a Bochs whose output goes to this file.
    pub(crate) fn new(output: PathBuf) -> Self {
        Self { output, file: None }
    }

    /// Reads what was drawn.
    pub(crate) fn drain(&mut self) {
        if self.file.is_none() {
            // There is no such terminal yet, or never.
            let said = std::fs::read(&self.output).unwrap_or_default();
            self.file = path_in(&String::from_utf8_lossy(&said)).and_then(|path| {
                let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
                OpenOptions::new().read(true).custom_flags(flags).open(path).ok()
            });
        }
        let mut buffer = [0; 4096];
        while let Some(Ok(1..)) = self.file.as_mut().map(|file| file.read(&mut buffer)) {}
    }
}

fn path_in(said: &str) -> Option<&str> {
    let (_, rest) = said.split_once(SAID)?;
    rest.split_once('"').map(|(path, _)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bochs_says_where_it_draws() {
        let said = "0000i[] x\n\nBochs connected to screen \"/dev/pts/5\"\nmore \"x\"";
        assert_eq!(path_in(said), Some("/dev/pts/5"));
        assert_eq!(path_in("Bochs connected to screen \"/dev/pt"), None);
        assert_eq!(path_in("Bochs x86 Emulator 3.1"), None);
    }

    #[test]
    fn where_there_is_none_nothing_is_read() {
        let mut terminal = Terminal::new(PathBuf::from("/nonexistent/output.txt"));
        terminal.drain();
        assert!(terminal.file.is_none());
    }
}
