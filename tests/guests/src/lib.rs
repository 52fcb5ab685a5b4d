//! Runtime of the test guests: small kernels that each show one behaviour and say by their exit
//! status whether they saw it.
//!
//! A guest is entered by the PVH protocol (32-bit, paging off), runs in long mode at CPL 0 with all
//! of its memory mapped one to one and usable at every CPL, and does not enable interrupts. What it
//! offers its tests:
//!
//! * [`probe!`] runs an instruction that may fault and says what happened ([`trap`]);
//! * [`ring::in_ring`] runs a closure at CPL 1, 2 or 3;
//! * [`split`] performs locked accesses and checks every effect they have;
//! * [`sixteen`] does so in real mode and in virtual-8086 mode;
//! * [`protected`] is for what long mode does not do;
//! * [`smp`] starts the other CPUs and lets all of them send each other IPIs; [`split`], [`sixteen`]
//!   and [`protected`] are for the first one alone;
//! * [`console`] prints, [`exit`] ends the machine.
//!
//! A guest defines its main function with [`guest!`]. Returning `Ok` ends the machine with
//! [`exit::SUCCESS`], a [`Failure`](exit::Failure) with that failure's code.

#![no_std]

mod area;
mod boot;
pub mod console;
pub mod cpu;
pub mod exit;
mod mem;
pub mod paging;
pub mod protected;
pub mod random;
pub mod ring;
pub mod segments;
pub mod sixteen;
pub mod smp;
pub mod split;
pub mod trap;

pub use boot::{Boot, image_end};

/// The build passes the linker script by its path only; this makes a change of it a reason to
/// build again.
const _: &[u8] = include_bytes!("../guest.ld");

/// Makes `$main`, a `fn(&Boot) -> Result<(), Failure>`, what the runtime calls.
#[macro_export]
macro_rules! guest {
    ($main:path) => {
        #[unsafe(no_mangle)]
        fn guest_main(boot: &$crate::Boot) -> Result<(), $crate::exit::Failure> {
            $main(boot)
        }
    };
}
