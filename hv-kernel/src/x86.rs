//! What is particular to the CPU: descriptor tables, exceptions, MSRs, VMX operation.

pub mod apic;
pub mod cpu;
pub mod exceptions;
pub mod idle;
pub mod mca;
pub mod msr;
pub mod segments;
pub mod stack;
pub mod startup;
