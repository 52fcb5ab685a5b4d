//! What is particular to the CPU: descriptor tables, exceptions, MSRs, VMX operation.

pub mod cpu;
pub mod exceptions;
pub mod msr;
pub mod segments;
