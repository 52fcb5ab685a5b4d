//! Unsplit: a bare-metal hypervisor that tames split locks. This is its kernel.

#![cfg_attr(not(test), no_std)]
#![cfg_attr(not(test), no_main)]
// What needs the machine is left out of host tests, which leaves some of the rest unused there.
#![cfg_attr(test, allow(dead_code))]

extern crate alloc;

mod acpi;
mod config;
mod devices;
mod events;
mod frames;
mod logger;
mod pvh;
mod ramdisk;
mod serial;
mod trail;

#[cfg(not(test))]
mod boot;
mod guest_memory;
#[cfg(not(test))]
mod mem_functions;
mod memory;
#[cfg(not(test))]
mod panic;
mod power;
#[cfg(not(test))]
mod sched;
#[cfg(not(test))]
mod vm;
#[cfg(not(test))]
mod x86;

/// The last exits of the boot CPU.
static TRAIL: trail::Trail = trail::Trail::new();
