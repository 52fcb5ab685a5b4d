//! The truth file: one JSON object a line for every split lock.

use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, Write};

/// What became of a split lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `#AC` was raised instead of the access.
    Faulted,
    /// The access happened, with a bus lock.
    Taken,
}

/// One split lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitLock {
    /// Bochs' CPU number.
    pub cpu: u32,
    /// Offset of the instruction in its code segment.
    pub rip: u64,
    /// Privilege level, 0 to 3.
    pub cpl: u8,
    /// In VMX non-root operation.
    pub vmx: bool,
    /// Whether it happened.
    pub outcome: Outcome,
}

impl Display for SplitLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, rip, cpl, vmx, outcome } = self;
        let outcome = match outcome {
            Outcome::Faulted => "faulted",
            Outcome::Taken => "taken",
        };
        write!(
            f,
            r#"{{"cpu":{cpu},"rip":"{rip:#x}","cpl":{cpl},"vmx":{vmx},"outcome":"{outcome}"}}"#
        )
    }
}

/// Appends one line, in one write, so that a reader of the growing file sees whole lines.
///
/// # Errors
/// Whatever the system says: the caller must not go on with an incomplete record.
pub fn record(mut file: &File, split_lock: &SplitLock) -> io::Result<()> {
    file.write_all(format!("{split_lock}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_json_with_the_documented_fields() {
        let split_lock = SplitLock {
            cpu: 3,
            rip: 0xffff_8000_0010_0ab0,
            cpl: 0,
            vmx: true,
            outcome: Outcome::Faulted,
        };
        assert_eq!(
            split_lock.to_string(),
            r#"{"cpu":3,"rip":"0xffff800000100ab0","cpl":0,"vmx":true,"outcome":"faulted"}"#
        );
        let taken = SplitLock { cpl: 3, vmx: false, outcome: Outcome::Taken, ..split_lock };
        assert_eq!(
            taken.to_string(),
            r#"{"cpu":3,"rip":"0xffff800000100ab0","cpl":3,"vmx":false,"outcome":"taken"}"#
        );
    }
}
