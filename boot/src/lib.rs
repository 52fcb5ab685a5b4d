//! The loader's core: from a kernel file, a ramdisk and a firmware memory map to a machine state in
//! which a `bootloader_api` kernel can be entered.
//!
//! Nothing here knows the firmware: physical memory is reached through [`physical::Memory`], so that
//! the same code runs in the BIOS stage (the binary of this package), under other firmware, and on
//! the host against a memory that records what was done to it.
//!
//! [`stick`] names the files that are read, [`archive`] makes a ramdisk of them, and [`log`] is what
//! the kernel leaves behind for the next boot.
//!
//! The way through: [`memory_map::MemoryMap`] makes sense of what the firmware reported,
//! [`frames::Frames`] hands out free memory from it, [`kernel::Kernel`] reads the ELF file,
//! [`load::load`] puts everything into place and [`handover::Handover::enter`] starts the kernel.
#![cfg_attr(not(test), no_std)]

pub mod archive;
pub mod cpu;
pub mod disk;
pub mod error;
pub mod frames;
pub mod gop;
pub mod handover;
pub mod identity;
pub mod kernel;
pub mod load;
pub mod log;
pub mod memory_map;
pub mod paging;
pub mod physical;
pub mod rsdp;
pub mod space;
pub mod stick;
pub mod uefi_map;
pub mod vbe;
pub mod volume;

pub use error::Error;

/// Size of a page and of a frame, in bytes.
pub const PAGE: u64 = 4096;
