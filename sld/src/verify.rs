//! The invariants of one CPU, looked at while the hypervisor runs: for test builds and for
//! operators who would rather know.

use core::fmt;

use crate::cpu::{Presence, bit, wanted};
use crate::hardware::{MsrFault, PreemptionDisabled, TestCtrl, ThisCpu};
use crate::mode::SldMode;
use crate::vcpu::Task;

/// Something that must hold does not: a fault of this crate or of how it is used, or someone else
/// who writes 0x33.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// This CPU goes by another flag than that of the task that it runs (in `Warn`; by a clear
    /// one elsewhere).
    Flag {
        /// The task's.
        expected: bool,
        /// The CPU's.
        found: bool,
    },
    /// 0x33 worked when this CPU came online, and cannot be read.
    Unreadable {
        /// The value that it should have.
        expected: u64,
    },
    /// 0x33 holds another value than the platform's bits and the real bit as it was last written.
    TestCtrl {
        /// The value that it should have.
        expected: u64,
        /// The value read.
        found: u64,
    },
    /// The real bit is not what the core's online threads want, or is on during a step.
    Core {
        /// What they want.
        expected: bool,
        /// The real bit.
        found: bool,
    },
    /// The real bit is off although this task wants it on, or on although it wants it off and no
    /// sibling is online: the core's counts are wrong.
    Task {
        /// What the task wants.
        expected: bool,
        /// The real bit.
        found: bool,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |on| if on { "on" } else { "off" };
        let set = |set| if set { "set" } else { "clear" };
        match *self {
            Self::Flag { expected, found } => {
                let (expected, found) = (set(expected), set(found));
                write!(f, "SLD_DISABLED of the task that runs: expected {expected}, found {found}")
            }
            Self::Unreadable { expected } => {
                write!(f, "MSR 0x33: expected {expected:#x}, found that it cannot be read")
            }
            Self::TestCtrl { expected, found } => {
                write!(f, "MSR 0x33: expected {expected:#x}, found {found:#x}")
            }
            Self::Core { expected, found } => {
                let (expected, found) = (on(expected), on(found));
                write!(f, "real bit, by the core's threads: expected {expected}, found {found}")
            }
            Self::Task { expected, found } => {
                let (expected, found) = (on(expected), on(found));
                write!(f, "real bit, by the task that runs: expected {expected}, found {found}")
            }
        }
    }
}

impl core::error::Error for Violation {}

/// Whether flags, counts and the real bit agree on this CPU, which runs `task`.
///
/// May be called after any operation of this crate, also during a step. Reads 0x33 where it works,
/// with the core locked; writes nothing. It costs an RDMSR and the lock, so a hypervisor calls it
/// where it is asked to.
///
/// # Errors
///
/// The first thing that is not as it must be.
pub fn verify(guard: &mut impl PreemptionDisabled, task: &Task) -> Result<(), Violation> {
    let ThisCpu { cpu, core, hardware } = guard.this_cpu();
    // Elsewhere the flag says nothing, and the CPU counts it as clear: a task that was warned may
    // have come here from a CPU that can detect.
    let flag = cpu.mode == SldMode::Warn && task.disabled;
    if cpu.disabled != flag {
        return Err(Violation::Flag { expected: flag, found: cpu.disabled });
    }
    if cpu.test_ctrl != Presence::Works {
        return Ok(());
    }
    let core = core.lock();
    let expected = cpu.platform_bits | bit(core.on);
    match hardware.read_test_ctrl() {
        Ok(found) if found == expected => {}
        Ok(found) => return Err(Violation::TestCtrl { expected, found }),
        Err(MsrFault) => return Err(Violation::Unreadable { expected }),
    }
    let expected = wanted(&core, cpu.mode);
    if core.on != expected {
        return Err(Violation::Core { expected, found: core.on });
    }
    // With the flag set, siblings may have the bit on. With it clear, nobody has it off.
    let siblings_decide = core.online > 1 && flag;
    if cpu.mode == SldMode::Warn && !core.stepping && !siblings_decide && core.on == flag {
        return Err(Violation::Task { expected: !flag, found: core.on });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::Violation::{Core, Flag, Task, TestCtrl, Unreadable};

    #[test]
    fn what_was_expected_and_found_is_said() {
        for (violation, text) in [
            (
                Flag { expected: true, found: false },
                "SLD_DISABLED of the task that runs: expected set, found clear",
            ),
            (
                Unreadable { expected: 0x2000_0010 },
                "MSR 0x33: expected 0x20000010, found that it cannot be read",
            ),
            (
                TestCtrl { expected: 0x2000_0010, found: 0x10 },
                "MSR 0x33: expected 0x20000010, found 0x10",
            ),
            (
                Core { expected: false, found: true },
                "real bit, by the core's threads: expected off, found on",
            ),
            (
                Task { expected: true, found: false },
                "real bit, by the task that runs: expected on, found off",
            ),
        ] {
            assert_eq!(violation.to_string(), text);
        }
    }
}
