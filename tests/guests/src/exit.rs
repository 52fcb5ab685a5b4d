//! How a guest ends: a code `v` written to the port of `isa-debug-exit`, which ends the machine
//! with the status `v << 1 | 1` (QEMU, `hw/misc/debugexit.c`). The codes stay below 0x80, so that
//! the status fits a process's.

use core::panic::PanicInfo;

use crate::area::this_cpu;
use crate::{cpu, println};

/// The guest saw what it is there to see (status 33).
pub const SUCCESS: u8 = 0x10;
/// The guest's subject is not there: the processor does not offer it (status 63).
pub const NOT_OFFERED: u8 = 0x1F;
/// The guest panicked (status 225). Codes from here on are the runtime's, those from 0x20 the
/// guests'.
pub const PANIC: u8 = 0x70;
/// An exception that no probe asked for (status 227).
pub const UNEXPECTED_EXCEPTION: u8 = 0x71;
/// The boot information is not what the PVH protocol promises (status 229).
pub const BAD_BOOT_INFO: u8 = 0x72;

/// Another CPU does not start (status 231).
pub const NOT_STARTED: u8 = 0x73;
/// Another CPU does not get on (status 233).
pub const STUCK: u8 = 0x74;

/// Port of `isa-debug-exit`.
const PORT: u16 = 0xF4;

/// What was not as it should be.
#[derive(Debug)]
pub struct Failure {
    /// The exit code, unlike that of any other failure of this guest.
    pub code: u8,
    /// In words.
    pub what: &'static str,
}

impl Failure {
    /// A failure with its code and words.
    pub const fn new(code: u8, what: &'static str) -> Self {
        Self { code, what }
    }

    /// `Err(self)` unless `right`.
    ///
    /// # Errors
    ///
    /// This failure.
    pub fn unless(self, right: bool) -> Result<(), Self> {
        if right { Ok(()) } else { Err(self) }
    }
}

/// Ends the machine because of a failure, at any CPL.
pub fn fail(failure: Failure) -> ! {
    match this_cpu() {
        0 => println!("failed ({:#x}): {}", failure.code, failure.what),
        cpu => println!("failed ({:#x}): {} (CPU {cpu})", failure.code, failure.what),
    }
    exit(failure.code)
}

/// Ends the machine with `code`; where nothing answers at the port, stays here. At any CPL.
pub fn exit(code: u8) -> ! {
    // SAFETY: nothing runs after it.
    unsafe { cpu::out8(PORT, code) };
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    println!("{info}");
    exit(PANIC)
}
