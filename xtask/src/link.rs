//! The machine's first serial port, connected with this process: a script or a terminal types on it.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;

use anyhow::{Context, Result};

/// What is sent to a machine's first serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Input {
    /// Nothing; it can only write.
    #[default]
    None,
    /// What this process's standard input says, once the hypervisor takes commands.
    Terminal,
    /// These, one after the other.
    Script(Vec<Reply>),
}

/// Something that is sent once the machine has written something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// What it has written, after what came before the reply before this one.
    pub after: String,
    /// What is sent then.
    pub send: Vec<u8>,
}

impl Reply {
    /// A line.
    pub fn line(after: &str, line: &str) -> Self {
        Self { after: after.to_owned(), send: format!("{line}\r").into_bytes() }
    }
}

/// What the hypervisor writes when it takes commands. Before that nobody reads what is sent.
const GREETING: &str = "console: type help";
/// Control-C, which a terminal sends as it is while it is [`Raw`].
const CONTROL_C: u8 = 0x03;

/// Where the machine is waited for.
pub(crate) struct Port(TcpListener);

impl Port {
    /// One, if the input needs it.
    pub(crate) fn of(input: &Input) -> Result<Option<Self>> {
        if *input == Input::None {
            return Ok(None);
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .context("cannot listen for the machine's serial port")?;
        listener.set_nonblocking(true)?;
        Ok(Some(Self(listener)))
    }

    /// Its number.
    pub(crate) fn number(&self) -> u16 {
        self.0.local_addr().map_or(0, |address| address.port())
    }
}

/// The connection. What comes in is appended to a file, as if the machine had written that.
pub(crate) struct Link {
    port: Port,
    stream: Option<TcpStream>,
    path: PathBuf,
    file: Option<File>,
    source: Source,
    /// What was written since the last reply.
    unanswered: Vec<u8>,
    /// What is to be sent and did not go out yet.
    unsent: Vec<u8>,
}

enum Source {
    Script(std::vec::IntoIter<Reply>, Option<Reply>),
    Terminal { is_open: bool, typed: Option<Typed> },
}

impl Link {
    /// Waits for the machine at `port`, and writes into the file at `path`.
    pub(crate) fn new(port: Port, path: PathBuf, input: &Input) -> Self {
        let source = match input {
            Input::Script(replies) => {
                let mut replies = replies.clone().into_iter();
                let next = replies.next();
                Source::Script(replies, next)
            }
            Input::None | Input::Terminal => Source::Terminal { is_open: false, typed: None },
        };
        let (unanswered, unsent) = (Vec::new(), Vec::new());
        Self { port, stream: None, path, file: None, source, unanswered, unsent }
    }

    /// Whether somebody may type something yet, however long that takes.
    pub(crate) fn is_attended(&self) -> bool {
        match &self.source {
            Source::Script(..) => false,
            Source::Terminal { typed, .. } => typed.as_ref().is_none_or(|typed| !typed.has_ended),
        }
    }

    /// Reads and sends what there is. False if whoever types wants to leave.
    pub(crate) fn exchange(&mut self) -> Result<bool> {
        if self.stream.is_none() {
            match self.port.0.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                    self.stream = Some(stream);
                }
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => {}
                Err(why) => return Err(why).context("the machine's serial port"),
            }
        }
        let Some(mut stream) = self.stream.take() else { return Ok(true) };
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                // Closed: the machine has ended.
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    self.unanswered.extend(&buffer[..count]);
                    let file = match &mut self.file {
                        Some(file) => file,
                        None => self
                            .file
                            .insert(OpenOptions::new().create(true).append(true).open(&self.path)?),
                    };
                    file.write_all(&buffer[..count])?;
                }
            }
        }
        let goes_on = self.answer();
        while !self.unsent.is_empty() {
            match stream.write(&self.unsent) {
                Ok(count) if count > 0 => drop(self.unsent.drain(..count)),
                // It does not read now, or not any more.
                _ => break,
            }
        }
        self.stream = Some(stream);
        Ok(goes_on)
    }

    /// What is sent for what was written.
    fn answer(&mut self) -> bool {
        match &mut self.source {
            Source::Script(replies, next) => {
                while let Some(reply) = next.take_if(|reply| {
                    let end = end_of(&self.unanswered, reply.after.as_bytes());
                    end.map(|end| self.unanswered.drain(..end)).is_some()
                }) {
                    self.unsent.extend(reply.send);
                    *next = replies.next();
                }
                true
            }
            Source::Terminal { is_open, typed } => {
                *is_open |= end_of(&self.unanswered, GREETING.as_bytes()).is_some();
                // A piece of the greeting may be there.
                let old = self.unanswered.len().saturating_sub(GREETING.len());
                self.unanswered.drain(..old);
                let typed = typed.get_or_insert_with(Typed::start);
                while let Some(bytes) = typed.next(*is_open) {
                    if typed.raw.is_some() && bytes.contains(&CONTROL_C) {
                        return false;
                    }
                    self.unsent.extend(bytes);
                }
                true
            }
        }
    }
}

/// Where `wanted` ends in `text`.
fn end_of(text: &[u8], wanted: &[u8]) -> Option<usize> {
    let found = text.windows(wanted.len().max(1)).position(|part| part.starts_with(wanted));
    found.map(|start| start + wanted.len())
}

/// The standard input.
struct Typed {
    bytes: Receiver<Vec<u8>>,
    /// What came before anybody could read it.
    early: Option<Vec<u8>>,
    /// Nothing more comes.
    has_ended: bool,
    /// Put back when the session ends.
    raw: Option<Raw>,
}

impl Typed {
    fn start() -> Self {
        let (sender, bytes) = mpsc::channel();
        // It ends with the process: nothing interrupts a read of a terminal.
        thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let raw = io::stdin().is_terminal().then(Raw::set).flatten();
        Self { bytes, early: None, has_ended: false, raw }
    }

    /// The next piece that can be sent, if `is_open`; Control-C always.
    fn next(&mut self, is_open: bool) -> Option<Vec<u8>> {
        if let Some(early) = self.early.take_if(|_| is_open) {
            return Some(early);
        }
        match self.bytes.try_recv() {
            Ok(bytes) if is_open || self.raw.is_some() && bytes.contains(&CONTROL_C) => Some(bytes),
            Ok(bytes) => {
                self.early.get_or_insert_default().extend(bytes);
                None
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                self.has_ended = true;
                None
            }
        }
    }
}

/// The terminal gives every key at once and shows nothing itself: the hypervisor does.
struct Raw(libc::termios);

impl Raw {
    fn set() -> Option<Self> {
        // SAFETY: a termios is numbers, and tcgetattr fills it in.
        let before = unsafe {
            let mut before = std::mem::zeroed();
            (libc::tcgetattr(libc::STDIN_FILENO, &raw mut before) == 0).then_some(before)?
        };
        let mut changed = before;
        changed.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ISIG);
        // SAFETY: what tcgetattr gave, changed in defined bits.
        let set = unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const changed) };
        (set == 0).then_some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: what tcgetattr gave.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::{Duration, Instant};

    #[test]
    fn a_text_is_found_in_pieces() {
        assert_eq!(end_of(b"one two", b"two"), Some(7));
        assert_eq!(end_of(b"one two", b"one"), Some(3));
        assert_eq!(end_of(b"one tw", b"two"), None);
        assert_eq!(end_of(b"", b"two"), None);
        assert_eq!(end_of(b"x", b""), Some(0));
    }

    #[test]
    fn a_script_answers_what_the_machine_writes_and_all_of_that_is_kept() {
        let path = crate::target_directory().join(format!("link-{}.txt", std::process::id()));
        let script = vec![Reply::line("ready", "list"), Reply::line("a", "quit")];
        let input = Input::Script(script);
        let port = Port::of(&input).unwrap().unwrap();
        let mut machine = TcpStream::connect((Ipv4Addr::LOCALHOST, port.number())).unwrap();
        machine.set_nonblocking(true).unwrap();
        let mut link = Link::new(port, path.clone(), &input);
        let mut got = Vec::new();
        let mut talk = |say: &str, expected: &str| {
            machine.write_all(say.as_bytes()).unwrap();
            let start = Instant::now();
            while got != expected.as_bytes() && start.elapsed() < Duration::from_secs(10) {
                assert!(link.exchange().unwrap());
                let _ = machine.read_to_end(&mut got);
            }
            assert_eq!(String::from_utf8_lossy(&got), expected);
        };
        talk("a rea", "");
        talk("dy\r\n", "list\r");
        talk(" a", "list\rquit\r");
        talk(" ready a", "list\rquit\r");
        link.exchange().unwrap();
        let start = Instant::now();
        while fs::read(&path).unwrap().len() < 18 && start.elapsed() < Duration::from_secs(10) {
            link.exchange().unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "a ready\r\n a ready a");
        fs::remove_file(&path).unwrap();
        assert!(Port::of(&Input::None).unwrap().is_none());
    }
}
