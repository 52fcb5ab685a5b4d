//! Why the kernel cannot be started, and what can be done about it.

use core::fmt;

use arrayvec::ArrayString;
use boot::stick;
use uefi::Status;

/// The longest path of a file that the loader reads, in bytes: the longest that an archive takes.
pub const MAX_PATH: usize = 100;

/// A path on the stick; what does not fit is left out.
pub type Path = ArrayString<MAX_PATH>;

/// What is said and ends the loader.
pub enum Failure {
    /// By the loader's core.
    Load(boot::Error),
    /// The firmware did not do what it was asked for.
    Firmware { what: &'static str, status: Status },
    /// A file is not there.
    Missing(Path),
    /// The firmware could not read a file.
    Unreadable { path: Path, status: Status },
    /// A file ends elsewhere than its directory says.
    WrongSize(Path),
    /// There is a guest's image whose name is too long or cannot be written in Unicode.
    BadName,
    /// There are more images than the kernel takes.
    TooManyFiles,
    /// The kernel is not what was written.
    Damaged(stick::Damaged),
    /// The CPU or the firmware lacks a feature.
    NoExecuteDisable,
}

impl From<boot::Error> for Failure {
    fn from(error: boot::Error) -> Self {
        Self::Load(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load(error) => error.fmt(f),
            Self::Firmware { what, status } => {
                write!(
                    f,
                    "the firmware refused {what} ({status}): try the stick in a machine with newer \
                 firmware, or boot it the BIOS way, if this machine's setup offers that"
                )
            }
            Self::Missing(path) => {
                write!(f, "there is no {path} on the stick: copy it there, or write the stick anew")
            }
            Self::Unreadable { path, status } => write!(
                f,
                "{path} cannot be read ({status}): write the stick anew, or take another one"
            ),
            Self::WrongSize(path) => write!(
                f,
                "{path} has not the size that its directory says: repair the stick's file system, or \
                 write the stick anew"
            ),
            Self::BadName => write!(
                f,
                "a file in the directory {} has a name that cannot be used: rename it to at most \
                 80 letters, digits and hyphens",
                stick::GUESTS
            ),
            Self::TooManyFiles => write!(
                f,
                "there are more than {} files in the directory {}: remove those that {} does not \
                 name",
                stick::MAX_FILES,
                stick::GUESTS,
                stick::CONFIG
            ),
            Self::Damaged(damaged) => damaged.fmt(f),
            Self::NoExecuteDisable => f.write_str(
                "the CPU has no execute-disable, or the firmware's setup turns it off (look for \
                 \"XD\" or \"NX\" there)",
            ),
        }
    }
}
