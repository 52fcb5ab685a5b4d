//! Why a kernel cannot be started.

use core::fmt;

/// What [`crate::load::load`] and its parts can complain of. Addresses and sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The kernel is not a well-formed ELF64 file.
    Elf(object::read::Error),
    /// The kernel is not an ELF executable that can be started.
    BadElf(&'static str),
    /// Program header number `index` of the kernel cannot be loaded.
    BadSegment {
        /// Position in the program header table.
        index: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A relocation of the kernel cannot be applied.
    BadRelocation(&'static str),
    /// The kernel does not carry a usable `bootloader_api` configuration.
    BadConfig(&'static str),
    /// The kernel asks for something that this loader does not do.
    Unsupported(&'static str),
    /// No free region of physical memory is large enough.
    NoMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was needed in one piece.
        bytes: u64,
        /// The largest free piece.
        largest: u64,
    },
    /// The kernel's dynamic range has no room left.
    NoAddressSpace {
        /// What was to be mapped.
        what: &'static str,
        /// How much of it.
        bytes: u64,
    },
    /// An address that the kernel demanded cannot be used.
    BadAddress {
        /// What was to be mapped there.
        what: &'static str,
        /// The virtual address.
        address: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The firmware reports more memory regions than the loader has room for.
    TooManyRegions,
    /// A file cannot become part of the ramdisk.
    BadFile(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Elf(why) => write!(f, "the kernel is not a well-formed ELF file: {why}"),
            Self::BadElf(why) => write!(f, "the kernel is not a usable ELF file: {why}"),
            Self::BadSegment { index, why } => {
                write!(f, "the kernel's program header {index} cannot be loaded: {why}")
            }
            Self::BadRelocation(why) => write!(f, "the kernel cannot be relocated: {why}"),
            Self::BadConfig(why) => write!(f, "the kernel's bootloader configuration: {why}"),
            Self::Unsupported(what) => {
                write!(f, "the kernel asks for {what}, which this loader does not do")
            }
            Self::NoMemory { what, bytes, largest } => write!(
                f,
                "not enough memory: {what} needs {} KiB in one piece, the largest free piece has \
                 {} KiB",
                bytes.div_ceil(1024),
                largest / 1024
            ),
            Self::NoAddressSpace { what, bytes } => {
                write!(f, "no room for {what} ({bytes:#x} bytes) in the dynamic address range")
            }
            Self::BadAddress { what, address, why } => {
                write!(f, "the kernel wants {what} at {address:#x}: {why}")
            }
            Self::TooManyRegions => write!(f, "the firmware's memory map has too many regions"),
            Self::BadFile(why) => write!(f, "a file cannot be given to the kernel: {why}"),
        }
    }
}
