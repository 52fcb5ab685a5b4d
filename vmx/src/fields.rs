//! VMCS fields, each typed by its width and its access.
//!
//! Encodings: SDM volume 3, appendix "Field Encoding in VMCS". Bits 14:13 of an encoding give the
//! width, bits 11:10 the kind (1: VM-exit information, read-only). [`Field::new`] compares both
//! with the Rust type when the constant is evaluated, so that a mistyped row does not compile.

use core::marker::PhantomData;

/// The width of a field: bits 14:13 of its encoding and the Rust type of its value.
pub trait Width {
    /// The type that holds a value of the field.
    type Value: Copy + Into<u64>;
    /// Bits 14:13 of the encoding.
    const CODE: u32;
    /// Takes the value out of the 64-bit register that VMREAD wrote.
    fn from_register(register: u64) -> Self::Value;
}

macro_rules! width {
    ($(#[$doc:meta])* $name:ident, $value:ty, $code:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub enum $name {}
        impl Width for $name {
            type Value = $value;
            const CODE: u32 = $code;
            #[inline(always)]
            fn from_register(register: u64) -> $value {
                register as $value
            }
        }
    };
}

width!(
    /// 16-bit field.
    W16, u16, 0
);
width!(
    /// 64-bit field.
    W64, u64, 1
);
width!(
    /// 32-bit field.
    W32, u32, 2
);
width!(
    /// Natural-width field: 64 bits on every CPU that this code runs on.
    Natural, u64, 3
);

/// Whether software may write the field.
pub trait Access {
    /// True for VM-exit information fields.
    const READ_ONLY: bool;
}

/// A field that VMREAD and VMWRITE take.
#[derive(Debug, Clone, Copy)]
pub enum ReadWrite {}
/// A VM-exit information field: VMREAD only.
#[derive(Debug, Clone, Copy)]
pub enum ReadOnly {}

impl Access for ReadWrite {
    const READ_ONLY: bool = false;
}
impl Access for ReadOnly {
    const READ_ONLY: bool = true;
}

/// One VMCS field.
#[derive(Debug)]
pub struct Field<W, A = ReadWrite> {
    encoding: u32,
    name: &'static str,
    kind: PhantomData<(W, A)>,
}

impl<W, A> Clone for Field<W, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W, A> Copy for Field<W, A> {}

impl<W: Width, A: Access> Field<W, A> {
    /// A field by its encoding.
    ///
    /// # Panics
    ///
    /// When the encoding does not have the width and access of the type: at compile time, since
    /// every field is a constant.
    pub const fn new(encoding: u32, name: &'static str) -> Self {
        assert!((encoding >> 13) & 3 == W::CODE, "width bits of the encoding");
        assert!(((encoding >> 10) & 3 == 1) == A::READ_ONLY, "type bits of the encoding");
        assert!(encoding & 1 == 0, "full access only");
        Self { encoding, name, kind: PhantomData }
    }

    /// The encoding, as VMREAD and VMWRITE take it.
    #[inline(always)]
    pub const fn encoding(self) -> u32 {
        self.encoding
    }

    /// The name in the SDM's words, for messages.
    pub const fn name(self) -> &'static str {
        self.name
    }
}

/// Reads fields of a VMCS.
pub trait VmcsRead {
    /// The value of a field that the CPU has.
    fn read<W: Width, A: Access>(&self, field: Field<W, A>) -> W::Value;
}

/// Writes fields of a VMCS.
pub trait VmcsWrite {
    /// Sets a field that the CPU has.
    fn write<W: Width>(&mut self, field: Field<W, ReadWrite>, value: W::Value);
}

/// A field of the guest-state area whose width is known at run time only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestField(u32);

impl GuestField {
    /// The field with this name, if it is one of the guest-state area: bits 11:10 of the encoding
    /// are 2.
    pub fn named(name: &str) -> Option<Self> {
        let guest = ALL.iter().filter(|(_, encoding)| (encoding >> 10) & 3 == 2);
        guest.into_iter().find(|row| row.0 == name).map(|row| Self(row.1))
    }

    /// The encoding.
    pub const fn encoding(self) -> u32 {
        self.0
    }
}

macro_rules! fields {
    ($($name:ident: $width:ty, $access:ty = $encoding:literal;)*) => {
        $(
            #[doc = concat!("Encoding `", stringify!($encoding), "`.")]
            pub const $name: Field<$width, $access> = Field::new($encoding, stringify!($name));
        )*

        /// All of them: name and encoding.
        const ALL: &[(&str, u32)] = &[$((stringify!($name), $encoding)),*];
    };
}

fields! {
    VPID: W16, ReadWrite = 0x0000;

    GUEST_ES_SELECTOR: W16, ReadWrite = 0x0800;
    GUEST_CS_SELECTOR: W16, ReadWrite = 0x0802;
    GUEST_SS_SELECTOR: W16, ReadWrite = 0x0804;
    GUEST_DS_SELECTOR: W16, ReadWrite = 0x0806;
    GUEST_FS_SELECTOR: W16, ReadWrite = 0x0808;
    GUEST_GS_SELECTOR: W16, ReadWrite = 0x080a;
    GUEST_LDTR_SELECTOR: W16, ReadWrite = 0x080c;
    GUEST_TR_SELECTOR: W16, ReadWrite = 0x080e;

    HOST_ES_SELECTOR: W16, ReadWrite = 0x0c00;
    HOST_CS_SELECTOR: W16, ReadWrite = 0x0c02;
    HOST_SS_SELECTOR: W16, ReadWrite = 0x0c04;
    HOST_DS_SELECTOR: W16, ReadWrite = 0x0c06;
    HOST_FS_SELECTOR: W16, ReadWrite = 0x0c08;
    HOST_GS_SELECTOR: W16, ReadWrite = 0x0c0a;
    HOST_TR_SELECTOR: W16, ReadWrite = 0x0c0c;

    IO_BITMAP_A: W64, ReadWrite = 0x2000;
    IO_BITMAP_B: W64, ReadWrite = 0x2002;
    MSR_BITMAPS: W64, ReadWrite = 0x2004;
    TSC_OFFSET: W64, ReadWrite = 0x2010;
    EPT_POINTER: W64, ReadWrite = 0x201a;
    GUEST_PHYSICAL_ADDRESS: W64, ReadOnly = 0x2400;
    VMCS_LINK_POINTER: W64, ReadWrite = 0x2800;
    GUEST_IA32_DEBUGCTL: W64, ReadWrite = 0x2802;
    GUEST_IA32_PAT: W64, ReadWrite = 0x2804;
    GUEST_IA32_EFER: W64, ReadWrite = 0x2806;
    GUEST_PDPTE0: W64, ReadWrite = 0x280a;
    GUEST_PDPTE1: W64, ReadWrite = 0x280c;
    GUEST_PDPTE2: W64, ReadWrite = 0x280e;
    GUEST_PDPTE3: W64, ReadWrite = 0x2810;
    HOST_IA32_PAT: W64, ReadWrite = 0x2c00;
    HOST_IA32_EFER: W64, ReadWrite = 0x2c02;

    PIN_BASED_CONTROLS: W32, ReadWrite = 0x4000;
    PRIMARY_CONTROLS: W32, ReadWrite = 0x4002;
    EXCEPTION_BITMAP: W32, ReadWrite = 0x4004;
    PAGE_FAULT_ERROR_CODE_MASK: W32, ReadWrite = 0x4006;
    PAGE_FAULT_ERROR_CODE_MATCH: W32, ReadWrite = 0x4008;
    CR3_TARGET_COUNT: W32, ReadWrite = 0x400a;
    PLE_GAP: W32, ReadWrite = 0x4020;
    PLE_WINDOW: W32, ReadWrite = 0x4022;
    EXIT_CONTROLS: W32, ReadWrite = 0x400c;
    EXIT_MSR_STORE_COUNT: W32, ReadWrite = 0x400e;
    EXIT_MSR_LOAD_COUNT: W32, ReadWrite = 0x4010;
    ENTRY_CONTROLS: W32, ReadWrite = 0x4012;
    ENTRY_MSR_LOAD_COUNT: W32, ReadWrite = 0x4014;
    ENTRY_INTERRUPTION_INFO: W32, ReadWrite = 0x4016;
    ENTRY_EXCEPTION_ERROR_CODE: W32, ReadWrite = 0x4018;
    ENTRY_INSTRUCTION_LENGTH: W32, ReadWrite = 0x401a;
    SECONDARY_CONTROLS: W32, ReadWrite = 0x401e;

    INSTRUCTION_ERROR: W32, ReadOnly = 0x4400;
    EXIT_REASON: W32, ReadOnly = 0x4402;
    EXIT_INTERRUPTION_INFO: W32, ReadOnly = 0x4404;
    EXIT_INTERRUPTION_ERROR_CODE: W32, ReadOnly = 0x4406;
    IDT_VECTORING_INFO: W32, ReadOnly = 0x4408;
    IDT_VECTORING_ERROR_CODE: W32, ReadOnly = 0x440a;
    EXIT_INSTRUCTION_LENGTH: W32, ReadOnly = 0x440c;

    GUEST_ES_LIMIT: W32, ReadWrite = 0x4800;
    GUEST_CS_LIMIT: W32, ReadWrite = 0x4802;
    GUEST_SS_LIMIT: W32, ReadWrite = 0x4804;
    GUEST_DS_LIMIT: W32, ReadWrite = 0x4806;
    GUEST_FS_LIMIT: W32, ReadWrite = 0x4808;
    GUEST_GS_LIMIT: W32, ReadWrite = 0x480a;
    GUEST_LDTR_LIMIT: W32, ReadWrite = 0x480c;
    GUEST_TR_LIMIT: W32, ReadWrite = 0x480e;
    GUEST_GDTR_LIMIT: W32, ReadWrite = 0x4810;
    GUEST_IDTR_LIMIT: W32, ReadWrite = 0x4812;
    GUEST_ES_ACCESS_RIGHTS: W32, ReadWrite = 0x4814;
    GUEST_CS_ACCESS_RIGHTS: W32, ReadWrite = 0x4816;
    GUEST_SS_ACCESS_RIGHTS: W32, ReadWrite = 0x4818;
    GUEST_DS_ACCESS_RIGHTS: W32, ReadWrite = 0x481a;
    GUEST_FS_ACCESS_RIGHTS: W32, ReadWrite = 0x481c;
    GUEST_GS_ACCESS_RIGHTS: W32, ReadWrite = 0x481e;
    GUEST_LDTR_ACCESS_RIGHTS: W32, ReadWrite = 0x4820;
    GUEST_TR_ACCESS_RIGHTS: W32, ReadWrite = 0x4822;
    GUEST_INTERRUPTIBILITY: W32, ReadWrite = 0x4824;
    GUEST_ACTIVITY_STATE: W32, ReadWrite = 0x4826;
    GUEST_SYSENTER_CS: W32, ReadWrite = 0x482a;
    PREEMPTION_TIMER_VALUE: W32, ReadWrite = 0x482e;
    HOST_SYSENTER_CS: W32, ReadWrite = 0x4c00;

    CR0_MASK: Natural, ReadWrite = 0x6000;
    CR4_MASK: Natural, ReadWrite = 0x6002;
    CR0_READ_SHADOW: Natural, ReadWrite = 0x6004;
    CR4_READ_SHADOW: Natural, ReadWrite = 0x6006;
    EXIT_QUALIFICATION: Natural, ReadOnly = 0x6400;
    GUEST_CR0: Natural, ReadWrite = 0x6800;
    GUEST_CR3: Natural, ReadWrite = 0x6802;
    GUEST_CR4: Natural, ReadWrite = 0x6804;
    GUEST_ES_BASE: Natural, ReadWrite = 0x6806;
    GUEST_CS_BASE: Natural, ReadWrite = 0x6808;
    GUEST_SS_BASE: Natural, ReadWrite = 0x680a;
    GUEST_DS_BASE: Natural, ReadWrite = 0x680c;
    GUEST_FS_BASE: Natural, ReadWrite = 0x680e;
    GUEST_GS_BASE: Natural, ReadWrite = 0x6810;
    GUEST_LDTR_BASE: Natural, ReadWrite = 0x6812;
    GUEST_TR_BASE: Natural, ReadWrite = 0x6814;
    GUEST_GDTR_BASE: Natural, ReadWrite = 0x6816;
    GUEST_IDTR_BASE: Natural, ReadWrite = 0x6818;
    GUEST_DR7: Natural, ReadWrite = 0x681a;
    GUEST_RSP: Natural, ReadWrite = 0x681c;
    GUEST_RIP: Natural, ReadWrite = 0x681e;
    GUEST_RFLAGS: Natural, ReadWrite = 0x6820;
    GUEST_PENDING_DEBUG: Natural, ReadWrite = 0x6822;
    GUEST_SYSENTER_ESP: Natural, ReadWrite = 0x6824;
    GUEST_SYSENTER_EIP: Natural, ReadWrite = 0x6826;
    HOST_CR0: Natural, ReadWrite = 0x6c00;
    HOST_CR3: Natural, ReadWrite = 0x6c02;
    HOST_CR4: Natural, ReadWrite = 0x6c04;
    HOST_FS_BASE: Natural, ReadWrite = 0x6c06;
    HOST_GS_BASE: Natural, ReadWrite = 0x6c08;
    HOST_TR_BASE: Natural, ReadWrite = 0x6c0a;
    HOST_GDTR_BASE: Natural, ReadWrite = 0x6c0c;
    HOST_IDTR_BASE: Natural, ReadWrite = 0x6c0e;
    HOST_SYSENTER_ESP: Natural, ReadWrite = 0x6c10;
    HOST_SYSENTER_EIP: Natural, ReadWrite = 0x6c12;
    HOST_RSP: Natural, ReadWrite = 0x6c14;
    HOST_RIP: Natural, ReadWrite = 0x6c16;
}

/// The fields of one segment register in the guest-state area.
#[derive(Debug, Clone, Copy)]
pub struct SegmentFields {
    /// Selector.
    pub selector: Field<W16>,
    /// Base address.
    pub base: Field<Natural>,
    /// Limit in bytes, whatever G says.
    pub limit: Field<W32>,
    /// Access rights: SDM volume 3, section "Guest Register State".
    pub rights: Field<W32>,
}

const fn segment(
    selector: Field<W16>,
    base: Field<Natural>,
    limit: Field<W32>,
    rights: Field<W32>,
) -> SegmentFields {
    SegmentFields { selector, base, limit, rights }
}

/// The segment registers in the order of their encodings: ES, CS, SS, DS, FS, GS, LDTR, TR.
pub const GUEST_SEGMENTS: [SegmentFields; 8] = [
    segment(GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS),
    segment(GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_ACCESS_RIGHTS),
    segment(GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS),
    segment(GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS),
    segment(GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS),
    segment(GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS),
    segment(GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_ACCESS_RIGHTS),
    segment(GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_ACCESS_RIGHTS),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_guest_state_is_found_by_name() {
        assert_eq!(GuestField::named("GUEST_RIP"), Some(GuestField(0x681e)));
        for name in ["HOST_RIP", "EXIT_REASON", "MSR_BITMAPS", "EPT_POINTER", "CR0_MASK", ""] {
            assert_eq!(GuestField::named(name), None, "{name}");
        }
    }
}
