//! Unsplit: a bare-metal hypervisor that tames split locks. This is its kernel.

#![cfg_attr(not(test), no_std)]
#![cfg_attr(not(test), no_main)]
// What needs the machine is left out of host tests, which leaves some of the rest unused there.
#![cfg_attr(test, allow(dead_code))]

extern crate alloc;

mod acpi;
mod clock;
mod config;
mod console;
mod deadlines;
mod devices;
mod events;
mod firmware;
mod frames;
mod gate;
mod keyboard;
mod logger;
mod machine_check;
mod monitor;
mod mtrr;
mod offenders;
mod pvh;
mod ramdisk;
mod runqueue;
mod screen;
mod serial;
mod source;
mod summary;
mod trail;
mod wake;

#[cfg(not(test))]
mod boot;
mod counters;
#[cfg(not(test))]
mod fleet;
mod guest_memory;
#[cfg(not(test))]
mod hardware;
#[cfg(not(test))]
mod inbox;
#[cfg(not(test))]
mod mem_functions;
mod memory;
#[cfg(not(test))]
mod operator;
#[cfg(not(test))]
mod panic;
#[cfg(not(test))]
mod percpu;
#[cfg(not(test))]
mod platform;
#[cfg(not(test))]
mod power;
#[cfg(not(test))]
mod sched;
#[cfg(not(test))]
mod smp;
#[cfg(not(test))]
mod task;
#[cfg(not(test))]
mod vm;
#[cfg(not(test))]
mod x86;
