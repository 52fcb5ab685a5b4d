//! The VMX instructions.
//!
//! Each is one `asm!` together with the flags it answers in: SDM volume 3, chapter "VMX
//! Instruction Reference", section "Conventions".

use core::arch::{asm, naked_asm};
use core::fmt;

use crate::addr::HostPhysAddr;
use crate::fields::{
    Access, Field, GuestField, INSTRUCTION_ERROR, PREEMPTION_TIMER_VALUE, ReadWrite, VmcsRead,
    VmcsWrite, Width,
};

/// Why a VMX instruction failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmFail {
    /// VMfailInvalid: there is no current VMCS to hold an error number.
    Invalid,
    /// VMfailValid with the VM-instruction error number.
    Valid(u32),
}

impl VmFail {
    /// The error in the SDM's words: section "VM Instruction Error Numbers".
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Invalid => "no current VMCS, or a bad VMXON or VMCS pointer",
            Self::Valid(number) => match number {
                1 => "VMCALL executed in VMX root operation",
                2 => "VMCLEAR with invalid physical address",
                3 => "VMCLEAR with VMXON pointer",
                4 => "VMLAUNCH with non-clear VMCS",
                5 => "VMRESUME with non-launched VMCS",
                6 => "VMRESUME after VMXOFF",
                7 => "VM entry with invalid control fields",
                8 => "VM entry with invalid host-state fields",
                9 => "VMPTRLD with invalid physical address",
                10 => "VMPTRLD with VMXON pointer",
                11 => "VMPTRLD with incorrect VMCS revision identifier",
                12 => "VMREAD or VMWRITE of an unsupported VMCS component",
                13 => "VMWRITE to a read-only VMCS component",
                15 => "VMXON executed in VMX root operation",
                16 => "VM entry with invalid executive-VMCS pointer",
                17 => "VM entry with non-launched executive VMCS",
                18 => "VM entry with executive-VMCS pointer not VMXON pointer",
                19 => "VMCALL with non-clear VMCS",
                20 => "VMCALL with invalid VM-exit control fields",
                22 => "VMCALL with incorrect MSEG revision identifier",
                23 => "VMXOFF under dual-monitor treatment",
                24 => "VMCALL with invalid SMM-monitor features",
                25 => "VM entry with invalid VM-execution control fields in executive VMCS",
                26 => "VM entry with events blocked by MOV SS",
                28 => "invalid operand to INVEPT or INVVPID",
                _ => "error number unknown to this program",
            },
        }
    }
}

impl fmt::Display for VmFail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid => write!(f, "VMfailInvalid: {}", self.describe()),
            Self::Valid(number) => write!(f, "VM-instruction error {number}: {}", self.describe()),
        }
    }
}

/// The TSC.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: RDTSC has no effect but on its registers.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The error number of VMRESUME with a VMCS that is not launched.
pub(crate) const RESUME_NOT_LAUNCHED: u32 = 5;

/// `invalid` is CF, `valid` is ZF after the instruction.
fn outcome(invalid: u8, valid: u8) -> Result<(), VmFail> {
    match (invalid, valid) {
        (0, 0) => Ok(()),
        (0, _) => Err(last_error()),
        _ => Err(VmFail::Invalid),
    }
}

/// The error number that the current VMCS holds.
pub(crate) fn last_error() -> VmFail {
    let number: u64;
    // SAFETY: VMREAD has no effect but on its destination and flags; called after VMfailValid,
    // which proves VMX operation and a current VMCS.
    unsafe {
        asm!("vmread {}, {}", out(reg) number, in(reg) u64::from(INSTRUCTION_ERROR.encoding()),
             options(nomem, nostack));
    }
    VmFail::Valid(number as u32)
}

macro_rules! region_instruction {
    ($(#[$doc:meta])* $name:ident, $mnemonic:literal) => {
        $(#[$doc])*
        pub unsafe fn $name(region: HostPhysAddr) -> Result<(), VmFail> {
            let address = region.as_u64();
            let (invalid, valid): (u8, u8);
            // SAFETY: the operand is a live u64; the caller answers for the region behind it.
            unsafe {
                asm!(concat!($mnemonic, " qword ptr [{}]"), "setc {}", "setz {}",
                     in(reg) &raw const address, out(reg_byte) invalid, out(reg_byte) valid,
                     options(nostack));
            }
            outcome(invalid, valid)
        }
    };
}

region_instruction!(
    /// VMXON.
    ///
    /// # Errors
    ///
    /// VMfail, when the region or its revision identifier is bad.
    ///
    /// # Safety
    ///
    /// CR4.VMXE is set, IA32_FEATURE_CONTROL allows VMXON, and the page at `region` belongs to
    /// this CPU until VMXOFF.
    vmxon,
    "vmxon"
);
region_instruction!(
    /// VMCLEAR: writes the VMCS back to memory and makes it inactive and clear.
    ///
    /// # Errors
    ///
    /// VMfail, when the pointer is bad.
    ///
    /// # Safety
    ///
    /// In VMX root operation; the page at `region` is a VMCS region that is active on no other CPU.
    vmclear,
    "vmclear"
);
region_instruction!(
    /// VMPTRLD: makes the VMCS current on this CPU.
    ///
    /// # Errors
    ///
    /// VMfail, when the pointer or the revision identifier is bad.
    ///
    /// # Safety
    ///
    /// In VMX root operation; the page at `region` is a VMCS region that is active on no other CPU
    /// and stays untouched by software until VMCLEAR.
    vmptrld,
    "vmptrld"
);

/// VMXOFF.
///
/// # Errors
///
/// VMfail, under dual-monitor treatment.
///
/// # Safety
///
/// In VMX root operation; nothing on this CPU relies on it any more.
pub unsafe fn vmxoff() -> Result<(), VmFail> {
    let (invalid, valid): (u8, u8);
    // SAFETY: the caller's obligation.
    unsafe {
        asm!("vmxoff", "setc {}", "setz {}", out(reg_byte) invalid, out(reg_byte) valid,
             options(nostack));
    }
    outcome(invalid, valid)
}

/// What INVEPT invalidates: SDM volume 3, "INVEPT—Invalidate Translations Derived from EPT".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvEpt {
    /// Translations derived from one EPT pointer.
    SingleContext(u64),
    /// All of them.
    AllContexts,
}

/// INVEPT.
///
/// # Errors
///
/// VMfail, when the CPU does not know the type.
///
/// # Safety
///
/// In VMX root operation.
pub unsafe fn invept(what: InvEpt) -> Result<(), VmFail> {
    let (kind, eptp) = match what {
        InvEpt::SingleContext(eptp) => (1u64, eptp),
        InvEpt::AllContexts => (2, 0),
    };
    // SAFETY: the caller's obligation.
    unsafe { invalidate!("invept", kind, [eptp, 0]) }
}

/// INVVPID of type "single-context": everything tagged with this VPID.
///
/// # Errors
///
/// VMfail, when the CPU does not know the type.
///
/// # Safety
///
/// In VMX root operation.
pub unsafe fn invvpid_single_context(vpid: u16) -> Result<(), VmFail> {
    // SAFETY: the caller's obligation.
    unsafe { invalidate!("invvpid", 1u64, [u64::from(vpid), 0]) }
}

macro_rules! invalidate {
    ($mnemonic:literal, $kind:expr, $descriptor:expr) => {{
        let descriptor: [u64; 2] = $descriptor;
        let (invalid, valid): (u8, u8);
        asm!(concat!($mnemonic, " {}, [{}]"), "setc {}", "setz {}", in(reg) $kind,
             in(reg) &raw const descriptor, out(reg_byte) invalid, out(reg_byte) valid,
             options(nostack));
        outcome(invalid, valid)
    }};
}
use invalidate;

/// Makes the VMX-preemption timer of whatever VMCS is current expire at the next VM entry. For an
/// NMI handler: VM entry may be what the NMI has interrupted the way to.
///
/// # Safety
///
/// In VMX root operation.
pub unsafe fn expire_preemption_timer() {
    // SAFETY: the caller's obligation. Without a current VMCS the instruction fails, and there is
    // nobody to stop; with one, the guest exits earlier than it would have.
    unsafe {
        asm!("vmwrite {}, {}", in(reg) u64::from(PREEMPTION_TIMER_VALUE.encoding()), in(reg) 0u64,
             options(nostack));
    }
}

/// Proof that a VMCS is current on this CPU, and the way to its fields.
///
/// There is at most one per CPU: [`crate::vcpu::Vcpu::load`] makes it, and whoever puts the vCPU
/// gives it back. It is neither `Send` nor `Sync`.
#[derive(Debug)]
pub struct CurrentVmcs {
    not_send: core::marker::PhantomData<*mut ()>,
}

impl CurrentVmcs {
    /// # Safety
    ///
    /// A VMPTRLD has succeeded on this CPU, and no VMCLEAR of the same region and no other VMPTRLD
    /// follows while the value lives.
    pub(crate) unsafe fn assume() -> Self {
        Self { not_send: core::marker::PhantomData }
    }

    /// Reads a field.
    ///
    /// A failure can only be ours (a field that this CPU does not have, used without looking at
    /// the capability MSRs), so it ends in a panic and costs the hot path one untaken branch.
    #[inline(always)]
    pub fn read<W: Width, A: Access>(&self, field: Field<W, A>) -> W::Value {
        let value: u64;
        // SAFETY: there is a current VMCS (type invariant); VMREAD writes its destination only.
        unsafe {
            asm!("vmread {}, {}", "jbe {}", out(reg) value,
                 in(reg) u64::from(field.encoding()), sym access_failed,
                 options(nomem, nostack));
        }
        W::from_register(value)
    }

    /// Writes a field of the guest-state area.
    ///
    /// # Errors
    ///
    /// VMfail, when this CPU does not have the field.
    pub fn write_guest(&mut self, field: GuestField, value: u64) -> Result<(), VmFail> {
        let (invalid, valid): (u8, u8);
        // SAFETY: there is a current VMCS (type invariant), and the field is the guest's.
        unsafe {
            asm!("vmwrite {}, {}", "setc {}", "setz {}", in(reg) u64::from(field.encoding()),
                 in(reg) value, out(reg_byte) invalid, out(reg_byte) valid,
                 options(nomem, nostack));
        }
        outcome(invalid, valid)
    }

    /// Writes a field; on failure as [`Self::read`].
    #[inline(always)]
    pub fn write<W: Width>(&mut self, field: Field<W, ReadWrite>, value: W::Value) {
        let value: u64 = value.into();
        // SAFETY: there is a current VMCS (type invariant). What a value does to the guest is
        // VMX policy; what it could do to the host is confined to the host-state fields, which
        // only `crate::vcpu` writes.
        unsafe {
            asm!("vmwrite {}, {}", "jbe {}", in(reg) u64::from(field.encoding()), in(reg) value,
                 sym access_failed, options(nomem, nostack));
        }
    }
}

impl VmcsRead for CurrentVmcs {
    fn read<W: Width, A: Access>(&self, field: Field<W, A>) -> W::Value {
        self.read(field)
    }
}

impl VmcsWrite for CurrentVmcs {
    fn write<W: Width>(&mut self, field: Field<W, ReadWrite>, value: W::Value) {
        self.write(field, value);
    }
}

/// Where a failed VMREAD or VMWRITE jumps: aligns the stack and panics.
#[unsafe(naked)]
extern "C" fn access_failed() -> ! {
    naked_asm!("and rsp, -16", "call {}", "ud2", sym access_panic)
}

extern "C" fn access_panic() -> ! {
    panic!("VMREAD or VMWRITE of the current VMCS: {}", last_error());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_decide_the_outcome() {
        assert_eq!(outcome(0, 0), Ok(()));
        assert_eq!(outcome(1, 0), Err(VmFail::Invalid));
    }

    #[test]
    fn errors_are_in_words() {
        assert!(std::format!("{}", VmFail::Valid(7)).contains("invalid control fields"));
        assert!(std::format!("{}", VmFail::Valid(99)).contains("unknown"));
    }
}
