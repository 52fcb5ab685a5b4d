//! What an operator types on a serial port: lines, commands, and how answers are laid out. Pure; what
//! commands do is in [`crate::operator`].

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use arrayvec::ArrayString;
use sld::{Policy, UnknownPolicy};

use crate::counters::Counters;
use vmx::split_lock::AcOutcome;

/// The longest line in characters.
pub const MAX_LINE: usize = 80;
/// What stands before what is typed.
pub const PROMPT: &str = "> ";

/// What a byte that came in changes.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// Nothing that could be seen.
    Nothing,
    /// The line has this character more.
    Added(char),
    /// Its last character is gone.
    Erased,
    /// It is empty again.
    Dropped,
    /// It is complete, and begins anew.
    Line(Result<ArrayString<MAX_LINE>, TooLong>),
}

/// The line had more than [`MAX_LINE`] characters. None of it is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the line is too long: {MAX_LINE} characters at most")
    }
}

/// Where the editor is in what terminals send for keys such as the arrows: ESC, `[` or `O`, then
/// parameters, then a letter or `~` (ECMA-48, section "Control sequences").
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Sequence {
    #[default]
    None,
    Escape,
    Parameters,
}

/// A line that is being typed. Whatever comes in, it stays bounded.
#[derive(Debug, Default)]
pub struct Editor {
    line: ArrayString<MAX_LINE>,
    too_long: bool,
    after_cr: bool,
    sequence: Sequence,
}

impl Editor {
    /// What is typed so far.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// Takes a byte.
    pub fn take(&mut self, byte: u8) -> Typed {
        const ESCAPE: u8 = 0x1b;
        const CONTROL_C: u8 = 0x03;
        const CONTROL_U: u8 = 0x15;
        let after_cr = core::mem::replace(&mut self.after_cr, byte == b'\r');
        match core::mem::take(&mut self.sequence) {
            Sequence::Escape if matches!(byte, b'[' | b'O') => {
                self.sequence = Sequence::Parameters;
                return Typed::Nothing;
            }
            Sequence::Parameters if matches!(byte, 0x20..=0x3f) => {
                self.sequence = Sequence::Parameters;
                return Typed::Nothing;
            }
            Sequence::Parameters if matches!(byte, 0x40..=0x7e) => return Typed::Nothing,
            _ => {}
        }
        match byte {
            b'\n' if after_cr => Typed::Nothing,
            b'\r' | b'\n' => {
                let line = core::mem::take(&mut self.line);
                let too_long = core::mem::take(&mut self.too_long);
                Typed::Line(if too_long { Err(TooLong) } else { Ok(line) })
            }
            0x08 | 0x7f => match self.line.pop() {
                Some(_) => Typed::Erased,
                None => Typed::Nothing,
            },
            CONTROL_C | CONTROL_U => {
                (self.line, self.too_long) = Default::default();
                Typed::Dropped
            }
            ESCAPE => {
                self.sequence = Sequence::Escape;
                Typed::Nothing
            }
            b' '..=b'~' => {
                let character = char::from(byte);
                if self.line.try_push(character).is_ok() {
                    Typed::Added(character)
                } else {
                    self.too_long = true;
                    Typed::Nothing
                }
            }
            // No command has anything else in it.
            _ => Typed::Nothing,
        }
    }
}

/// What an operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    /// What there is.
    Help,
    /// All VMs in a table.
    List,
    /// What this VM's vCPUs have counted.
    Show(&'a str),
    /// This VM has this policy from now on.
    Policy(&'a str, Policy),
    /// This VM ends.
    Stop(&'a str),
    /// This VM, which has ended, is made anew.
    Start(&'a str),
    /// The same, and it ends first if it runs.
    Restart(&'a str),
    /// All VMs end, and with them the run.
    Quit,
}

/// Why a line is no command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoCommand<'a> {
    /// There is none of this name.
    Unknown(&'a str),
    /// This command is used otherwise.
    Usage(&'static str),
    /// There is no such policy.
    Policy(UnknownPolicy),
}

/// Each command, and what it does.
pub const COMMANDS: [(&str, &str); 8] = [
    ("help", "this list"),
    ("list", "all VMs, and the memory that is free"),
    ("show VM", "what each of its vCPUs has counted"),
    (
        "policy VM POLICY",
        "what is done about its split locks: off, warn, step, emulate, ratelimit=N, fatal",
    ),
    ("stop VM", "ends it; the others go on, and the run does not end while it could be started"),
    ("start VM", "makes one that has ended anew"),
    ("restart VM", "the same, and ends it first if it runs"),
    ("quit", "ends all VMs and the run"),
];

impl fmt::Display for NoCommand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(word) => write!(
                f,
                "no command `{word}`: help, list, show, policy, stop, start, restart, quit"
            ),
            Self::Usage(usage) => write!(f, "usage: {usage}"),
            Self::Policy(unknown) => unknown.fmt(f),
        }
    }
}

impl<'a> Command<'a> {
    /// Reads a line. `None` if there is nothing in it.
    ///
    /// # Errors
    ///
    /// [`NoCommand`].
    pub fn parse(line: &'a str) -> Option<Result<Self, NoCommand<'a>>> {
        let mut words = line.split_ascii_whitespace();
        let name = words.next()?;
        let arguments = [words.next(), words.next(), words.next()];
        let usage = COMMANDS.iter().map(|(usage, _)| *usage);
        let usage = usage.into_iter().find(|usage| usage.split(' ').next() == Some(name));
        let Some(usage) = usage else { return Some(Err(NoCommand::Unknown(name))) };
        Some(match (name, arguments) {
            ("help", [None, ..]) => Ok(Self::Help),
            ("list", [None, ..]) => Ok(Self::List),
            ("show", [Some(vm), None, _]) => Ok(Self::Show(vm)),
            ("policy", [Some(vm), Some(policy), None]) => {
                policy.parse().map(|policy| Self::Policy(vm, policy)).map_err(NoCommand::Policy)
            }
            ("stop", [Some(vm), None, _]) => Ok(Self::Stop(vm)),
            ("start", [Some(vm), None, _]) => Ok(Self::Start(vm)),
            ("restart", [Some(vm), None, _]) => Ok(Self::Restart(vm)),
            ("quit", [None, ..]) => Ok(Self::Quit),
            _ => Err(NoCommand::Usage(usage)),
        })
    }
}

/// The answer to `help`.
pub fn help() -> Vec<String> {
    let rows = COMMANDS.map(|(usage, meaning)| [usage, meaning].map(String::from));
    table(&rows)
}

/// Rows in columns, a line each.
pub fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; COLUMNS] = core::array::from_fn(width);
    let line = |row: &[String; COLUMNS]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  "));
        String::from(cells.collect::<String>().trim_end())
    };
    rows.iter().map(line).collect()
}

/// What was counted, in lines; `of` is whose.
pub fn counted(of: &str, counters: &Counters) -> Vec<String> {
    let Counters { real_bit_writes, loads, migrations, ticks, .. } = counters;
    let locks = AcOutcome::ALL.iter().map(|done| (done.as_str(), counters.split_locks.of(*done)));
    let locks = pairs(locks.filter(|(_, count)| *count > 0));
    let exits = counters.exits.exits();
    let exits = pairs(exits.map(|(reason, count)| (reason.name().unwrap_or("other"), count)));
    let mut lines = Vec::from([
        format!(
            "{of}: ticks {ticks}, loads {loads}, migrations {migrations}, real-bit writes {real_bit_writes}"
        ),
        format!("  split locks: {locks}"),
        format!("  exits: {exits}"),
    ]);
    // What tells of them where split locks are not detected.
    if counters.exits.bus_locks > 0 {
        lines.insert(2, format!("  bus locks: {}", counters.exits.bus_locks));
    }
    lines
}

fn pairs<'a>(counts: impl Iterator<Item = (&'a str, u64)>) -> String {
    let parts: Vec<String> = counts.map(|(name, count)| format!("{name} {count}")).collect();
    if parts.is_empty() { String::from("none") } else { parts.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;
    use std::vec;

    /// What comes of these bytes: the lines, and what an echo would show.
    fn type_in(bytes: &[u8]) -> (Vec<String>, String) {
        let mut editor = Editor::default();
        let (mut lines, mut shown) = (vec![], String::new());
        for byte in bytes {
            match editor.take(*byte) {
                Typed::Nothing => {}
                Typed::Added(character) => shown.push(character),
                Typed::Erased => assert!(shown.pop().is_some()),
                Typed::Dropped => shown.clear(),
                Typed::Line(line) => {
                    lines.push(line.map_or_else(|why| why.to_string(), |line| line.to_string()));
                    shown.clear();
                }
            }
            assert!(shown.ends_with(editor.line()) && editor.line().len() == shown.len());
        }
        (lines, shown)
    }

    #[test]
    fn lines_end_with_any_line_end() {
        let (lines, rest) = type_in(b"list\rhelp\r\nshow a\n\nqui");
        assert_eq!(lines, ["list", "help", "show a", ""]);
        assert_eq!(rest, "qui");
    }

    #[test]
    fn what_is_typed_can_be_taken_back() {
        assert_eq!(type_in(b"\x08\x7flisp\x08t\x7ft\n").0, ["list"]);
        assert_eq!(type_in(b"quit\x15list\n").0, ["list"]);
        assert_eq!(type_in(b"quit\x03\n").0, [""]);
    }

    #[test]
    fn keys_that_are_no_characters_are_passed_over() {
        assert_eq!(type_in(b"li\x1b[A\x1b[1;5Cs\x1bOPt\x1b[3~\n").0, ["list"]);
        assert_eq!(type_in(b"\x1bl\x1b\x1b[Ai\x00\x01s\xff\x80t\t\n").0, ["list"]);
    }

    #[test]
    fn a_line_has_a_bound_and_the_next_one_is_a_new_one() {
        let full = [b'x'; MAX_LINE];
        assert_eq!(
            type_in(&[&full[..], b"\n"].concat()).0,
            [String::from_utf8(full.into()).unwrap()]
        );
        let (lines, _) = type_in(&[&full[..], b"y\nlist\n"].concat());
        assert_eq!(lines, [TooLong.to_string(), "list".to_string()]);
        // Nothing comes back of what did not fit.
        let (lines, _) = type_in(&[&full[..], b"y\x08\n"].concat());
        assert_eq!(lines, [TooLong.to_string()]);
        let (lines, _) = type_in(&[&full[..], b"y\x15list\n"].concat());
        assert_eq!(lines, ["list"]);
    }

    #[test]
    fn any_bytes_do() {
        let mut state = 1u32;
        let bytes: Vec<u8> = (0..100_000)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        for line in type_in(&bytes).0 {
            assert!(line.len() <= MAX_LINE);
            if let Some(Ok(command)) = Command::parse(&line) {
                panic!("{line:?} is {command:?}");
            }
        }
    }

    #[test]
    fn commands_are_read() {
        let parse = |line| Command::parse(line).unwrap();
        assert_eq!(parse("help"), Ok(Command::Help));
        assert_eq!(parse("  list  "), Ok(Command::List));
        assert_eq!(parse("show a"), Ok(Command::Show("a")));
        assert_eq!(parse("policy a step"), Ok(Command::Policy("a", Policy::Step)));
        let limit = "ratelimit=7".parse().unwrap();
        assert_eq!(parse("policy\ta ratelimit=7"), Ok(Command::Policy("a", limit)));
        assert_eq!(parse("stop a"), Ok(Command::Stop("a")));
        assert_eq!(parse("start a"), Ok(Command::Start("a")));
        assert_eq!(parse("restart a"), Ok(Command::Restart("a")));
        assert_eq!(parse("quit"), Ok(Command::Quit));
        assert_eq!((Command::parse(""), Command::parse("   ")), (None, None));
    }

    #[test]
    fn what_is_no_command_says_what_is_one() {
        let text = |line| Command::parse(line).unwrap().unwrap_err().to_string();
        for line in ["lst", "LIST", "show\u{0}", "?"] {
            let text = text(line);
            assert!(text.starts_with("no command `"), "{text}");
            for (usage, _) in COMMANDS {
                assert!(text.contains(usage.split(' ').next().unwrap()), "{text}: {usage}");
            }
        }
        assert_eq!(text("show"), "usage: show VM");
        assert_eq!(text("show a b"), "usage: show VM");
        assert_eq!(text("list a"), "usage: list");
        assert_eq!(text("policy a"), "usage: policy VM POLICY");
        assert_eq!(text("policy a step now"), "usage: policy VM POLICY");
        assert_eq!(text("policy a on"), UnknownPolicy.to_string());
        assert_eq!(text("quit now"), "usage: quit");
    }

    #[test]
    fn every_command_has_its_line_of_help() {
        let help = help();
        assert_eq!(help.len(), COMMANDS.len());
        assert!(help.iter().all(|line| line.len() <= 110), "{help:#?}");
        for (usage, _) in COMMANDS {
            let known = Command::parse(usage.split(' ').next().unwrap()).unwrap();
            assert!(!matches!(known, Err(NoCommand::Unknown(_))), "{usage}");
        }
    }

    #[test]
    fn tables_have_columns() {
        let rows = [["a", "bbb", ""], ["aaa", "b", "c"]].map(|row| row.map(String::from));
        assert_eq!(table(&rows), ["a    bbb", "aaa  b    c"]);
    }

    #[test]
    fn only_what_has_happened_is_counted_up() {
        let mut counters = Counters::new();
        counters.loads = 3;
        assert_eq!(
            counted("vCPU 0", &counters),
            [
                "vCPU 0: ticks 0, loads 3, migrations 0, real-bit writes 0",
                "  split locks: none",
                "  exits: none"
            ]
        );
        counters.split_locks.count(AcOutcome::Warn, false);
        counters.split_locks.count(AcOutcome::Emulate, false);
        counters.exits.count(vmx::exit::BasicReason::CPUID);
        assert_eq!(
            counted("x", &counters)[1..],
            ["  split locks: warn 1, emulate 1", "  exits: cpuid 1"]
        );
        counters.exits.bus_locks = 7;
        assert_eq!(counted("x", &counters)[2..], ["  bus locks: 7", "  exits: cpuid 1"]);
    }
}
