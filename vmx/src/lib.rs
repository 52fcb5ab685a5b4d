//! Intel VT-x: definitions, VMCS, extended page tables, and the loop that runs a guest.
//!
//! Everything but the instructions themselves (`instruction`, `world`, `vcpu`) compiles to pure
//! code that is tested on any host. What a guest's split lock means is decided by the [`sld`]
//! crate; what surrounds a guest (memory, devices, the log) is the [`run::Host`] that the
//! hypervisor kernel implements.

#![cfg_attr(not(test), no_std)]

pub mod addr;
pub mod apic;
pub mod bitmap;
pub mod bus_lock;
pub mod capability;
pub mod checks;
pub mod controls;
pub mod cpuid;
pub mod emulate;
pub mod ept;
pub mod exit;
pub mod fields;
pub mod instruction;
pub mod mailbox;
pub mod msr_policy;
pub mod paravirtual;
pub mod run;
pub mod setup;
pub mod split_lock;
pub mod trace;
pub mod vcpu;
pub mod walk;
pub mod world;
pub mod xstate;
