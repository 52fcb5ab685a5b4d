//! VM-exit information, decoded: reasons, interruption information, qualifications.
//!
//! Numbers that the hardware may extend are open: an unknown one is a value to be reported.
//! Source: SDM volume 3, section "Information for VM Exits Due to Vectored Events", section
//! "Exit Qualification" and appendix "VMX Basic Exit Reasons".

use core::fmt;

/// The 32-bit exit-reason field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitReason(pub u32);

impl ExitReason {
    /// Bit 31: the VM entry itself failed, no guest instruction was executed.
    pub const fn is_entry_failure(self) -> bool {
        self.0 >> 31 == 1
    }

    /// Bit 26: the guest took the bus before the exit, which is for another reason or for that.
    pub const fn has_bus_lock(self) -> bool {
        self.0 >> 26 & 1 == 1 && !self.is_entry_failure()
    }

    /// One of these two.
    #[inline(always)]
    pub const fn is_unusual(self) -> bool {
        self.0 & (1 << 31 | 1 << 26) != 0
    }

    /// Bits 15:0.
    pub const fn basic(self) -> BasicReason {
        BasicReason(self.0 as u16)
    }
}

/// A basic exit reason: any number, those known to this program by name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BasicReason(pub u16);

macro_rules! reasons {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        impl BasicReason {
            $(#[doc = concat!("Basic exit reason ", stringify!($number), ".")]
              pub const $name: Self = Self($number);)*

            /// The reason's short name, as it stands in events; `None` when unknown.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

reasons! {
    EXCEPTION_OR_NMI = 0, "exception";
    EXTERNAL_INTERRUPT = 1, "external-interrupt";
    TRIPLE_FAULT = 2, "triple-fault";
    INIT = 3, "init";
    SIPI = 4, "sipi";
    INTERRUPT_WINDOW = 7, "interrupt-window";
    NMI_WINDOW = 8, "nmi-window";
    TASK_SWITCH = 9, "task-switch";
    CPUID = 10, "cpuid";
    GETSEC = 11, "getsec";
    HLT = 12, "hlt";
    INVD = 13, "invd";
    INVLPG = 14, "invlpg";
    RDPMC = 15, "rdpmc";
    RDTSC = 16, "rdtsc";
    RSM = 17, "rsm";
    VMCALL = 18, "vmcall";
    VMCLEAR = 19, "vmclear";
    VMLAUNCH = 20, "vmlaunch";
    VMPTRLD = 21, "vmptrld";
    VMPTRST = 22, "vmptrst";
    VMREAD = 23, "vmread";
    VMRESUME = 24, "vmresume";
    VMWRITE = 25, "vmwrite";
    VMXOFF = 26, "vmxoff";
    VMXON = 27, "vmxon";
    CR_ACCESS = 28, "cr-access";
    DR_ACCESS = 29, "dr-access";
    IO = 30, "io";
    RDMSR = 31, "rdmsr";
    WRMSR = 32, "wrmsr";
    INVALID_GUEST_STATE = 33, "invalid-guest-state";
    MSR_LOADING = 34, "msr-loading";
    MWAIT = 36, "mwait";
    MONITOR_TRAP_FLAG = 37, "monitor-trap-flag";
    MONITOR = 39, "monitor";
    PAUSE = 40, "pause";
    MACHINE_CHECK_DURING_ENTRY = 41, "machine-check-during-entry";
    TPR_BELOW_THRESHOLD = 43, "tpr-below-threshold";
    APIC_ACCESS = 44, "apic-access";
    VIRTUALIZED_EOI = 45, "virtualized-eoi";
    GDTR_IDTR_ACCESS = 46, "gdtr-idtr-access";
    LDTR_TR_ACCESS = 47, "ldtr-tr-access";
    EPT_VIOLATION = 48, "ept-violation";
    EPT_MISCONFIGURATION = 49, "ept-misconfiguration";
    INVEPT = 50, "invept";
    RDTSCP = 51, "rdtscp";
    PREEMPTION_TIMER = 52, "preemption-timer";
    INVVPID = 53, "invvpid";
    WBINVD = 54, "wbinvd";
    XSETBV = 55, "xsetbv";
    APIC_WRITE = 56, "apic-write";
    RDRAND = 57, "rdrand";
    INVPCID = 58, "invpcid";
    VMFUNC = 59, "vmfunc";
    ENCLS = 60, "encls";
    RDSEED = 61, "rdseed";
    PML_FULL = 62, "pml-full";
    XSAVES = 63, "xsaves";
    XRSTORS = 64, "xrstors";
    BUS_LOCK = 74, "bus-lock";
    NOTIFY = 75, "notify";
}

impl fmt::Display for BasicReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "reason-{}", self.0),
        }
    }
}

impl fmt::Debug for BasicReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Exception and interrupt vectors that this program treats by name.
pub mod vector {
    /// #DB, debug exception.
    pub const DB: u8 = 1;
    /// NMI.
    pub const NMI: u8 = 2;
    /// #UD, invalid opcode.
    pub const UD: u8 = 6;
    /// #GP, general protection.
    pub const GP: u8 = 13;
    /// #AC, alignment check.
    pub const AC: u8 = 17;
    /// #MC, machine check.
    pub const MC: u8 = 18;
}

/// The kind of a vectored event: bits 10:8 of an interruption-information field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// External interrupt.
    External = 0,
    /// Reserved on exits, not used on entries.
    Reserved = 1,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Hardware exception.
    HardwareException = 3,
    /// `INT n`.
    SoftwareInterrupt = 4,
    /// `INT1`.
    PrivilegedSoftwareException = 5,
    /// `INT3`, `INTO`.
    SoftwareException = 6,
    /// Not an event: a pending monitor trap.
    Other = 7,
}

impl EventKind {
    const fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::External,
            1 => Self::Reserved,
            2 => Self::Nmi,
            3 => Self::HardwareException,
            4 => Self::SoftwareInterrupt,
            5 => Self::PrivilegedSoftwareException,
            6 => Self::SoftwareException,
            _ => Self::Other,
        }
    }

    /// Whether delivery pushes the address after the instruction, so that an instruction length
    /// is needed to inject the event.
    pub const fn is_software(self) -> bool {
        matches!(
            self,
            Self::SoftwareInterrupt | Self::PrivilegedSoftwareException | Self::SoftwareException
        )
    }
}

/// VM-exit interruption information and IDT-vectoring information: one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    const ERROR_CODE: u32 = 1 << 11;
    const VALID: u32 = 1 << 31;

    /// The information that injects an event.
    pub const fn inject(kind: EventKind, vector: u8, error_code: bool) -> Self {
        let error = if error_code { Self::ERROR_CODE } else { 0 };
        Self(vector as u32 | (kind as u32) << 8 | error | Self::VALID)
    }

    /// Bit 31: there is an event.
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// Bits 7:0.
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// Bits 10:8.
    pub const fn kind(self) -> EventKind {
        EventKind::from_bits(self.0 >> 8)
    }

    /// Bit 11: an error code goes with it.
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }

    /// Bit 12 of the exit's information: IRET had undone NMI blocking when the exit came.
    pub const fn nmi_unblocked_by_iret(self) -> bool {
        self.0 & 1 << 12 != 0
    }

    /// The bits that VM entry takes: without bit 12, which only exits have.
    pub const fn for_entry(self) -> u32 {
        self.0 & (Self::VALID | Self::ERROR_CODE | 0x7ff)
    }
}

/// Exit qualification of an I/O instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoQualification(pub u64);

impl IoQualification {
    /// Operand size in bytes: 1, 2 or 4.
    pub const fn size(self) -> u8 {
        (self.0 & 7) as u8 + 1
    }

    /// True for IN.
    pub const fn is_in(self) -> bool {
        self.0 & 1 << 3 != 0
    }

    /// True for INS and OUTS.
    pub const fn is_string(self) -> bool {
        self.0 & 1 << 4 != 0
    }

    /// The port.
    pub const fn port(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// Exit qualification of a control-register access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrQualification(pub u64);

/// What a control-register instruction does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrAccess {
    /// MOV to CR.
    Write,
    /// MOV from CR.
    Read,
    /// CLTS.
    Clts,
    /// LMSW with the 16-bit source.
    Lmsw(u16),
}

impl CrQualification {
    /// The control register's number.
    pub const fn register(self) -> u8 {
        (self.0 & 0xf) as u8
    }

    /// The kind of access.
    pub const fn access(self) -> CrAccess {
        match (self.0 >> 4) & 3 {
            0 => CrAccess::Write,
            1 => CrAccess::Read,
            2 => CrAccess::Clts,
            _ => CrAccess::Lmsw((self.0 >> 16) as u16),
        }
    }

    /// The general-purpose register's number, in the order of instruction encoding.
    pub const fn operand(self) -> usize {
        (self.0 >> 8) as usize & 0xf
    }
}

/// Exit qualification of an EPT violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EptQualification(pub u64);

impl EptQualification {
    /// The access was a data read.
    pub const fn is_read(self) -> bool {
        self.0 & 1 << 0 != 0
    }

    /// The access was a data write.
    pub const fn is_write(self) -> bool {
        self.0 & 1 << 1 != 0
    }

    /// The access was an instruction fetch.
    pub const fn is_fetch(self) -> bool {
        self.0 & 1 << 2 != 0
    }

    /// IRET had undone NMI blocking when the exit came.
    pub const fn nmi_unblocked_by_iret(self) -> bool {
        self.0 & 1 << 12 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bus_lock_beside_another_reason() {
        let decoded = |value| {
            let reason = ExitReason(value);
            (reason.basic(), reason.has_bus_lock(), reason.is_entry_failure(), reason.is_unusual())
        };
        assert_eq!(decoded(10), (BasicReason::CPUID, false, false, false));
        assert_eq!(decoded(1 << 26 | 10), (BasicReason::CPUID, true, false, true));
        assert_eq!(decoded(74), (BasicReason::BUS_LOCK, false, false, false));
        assert_eq!(decoded(1 << 26 | 74), (BasicReason::BUS_LOCK, true, false, true));
        // No instruction was executed.
        assert_eq!(decoded(5 << 29 | 33), (BasicReason::INVALID_GUEST_STATE, false, true, true));
        assert!(!decoded(1 << 31 | 1 << 26 | 33).1);
        // Others of the upper half.
        assert_eq!(
            decoded(1 << 27 | 1 << 29 | 1),
            (BasicReason::EXTERNAL_INTERRUPT, false, false, false)
        );
    }

    #[test]
    fn every_reason_has_a_text() {
        for number in 0..=u16::MAX {
            let text = std::format!("{}", BasicReason(number));
            assert!(!text.is_empty());
            assert_eq!(BasicReason(number).name().is_none(), text.starts_with("reason-"));
        }
        assert_eq!(std::format!("{}", BasicReason::CPUID), "cpuid");
    }

    #[test]
    fn the_ac_exit_decodes() {
        let info = InterruptionInfo(0x8000_0b11);
        assert!(info.is_valid() && info.has_error_code());
        assert_eq!((info.vector(), info.kind()), (vector::AC, EventKind::HardwareException));
        assert_eq!(InterruptionInfo::inject(EventKind::HardwareException, 17, true), info);
    }

    #[test]
    fn entry_failure_is_apart_from_the_reason() {
        let reason = ExitReason(0x8000_0021);
        assert!(reason.is_entry_failure());
        assert_eq!(reason.basic(), BasicReason::INVALID_GUEST_STATE);
    }

    #[test]
    fn io_qualification() {
        let out = IoQualification(0x03f8_0000);
        assert_eq!(
            (out.port(), out.size(), out.is_in(), out.is_string()),
            (0x3f8, 1, false, false)
        );
        let ins = IoQualification(0x0cf8_001b);
        assert_eq!((ins.port(), ins.size(), ins.is_in(), ins.is_string()), (0xcf8, 4, true, true));
    }

    #[test]
    fn cr_qualification() {
        let mov = CrQualification(0x0304);
        assert_eq!((mov.register(), mov.access(), mov.operand()), (4, CrAccess::Write, 3));
        assert_eq!(CrQualification(0xabcd_0030).access(), CrAccess::Lmsw(0xabcd));
    }
    /// Bits that no decoder is to look at, in several patterns.
    const NOISE: [u64; 4] = [0, u64::MAX, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa];

    #[test]
    fn interruption_information_decodes_and_injects() {
        for (low, noise) in (0u32..1 << 13).flat_map(|low| NOISE.map(|noise| (low, noise as u32))) {
            for valid in [0, 1 << 31] {
                let info = InterruptionInfo(valid | noise & 0x7fff_e000 | low);
                assert_eq!(info.is_valid(), valid != 0);
                assert_eq!(u32::from(info.vector()), low % 256);
                assert_eq!(info.kind() as u32, low / 256 % 8);
                assert_eq!(info.has_error_code(), low / 2048 % 2 == 1);
                assert_eq!(info.nmi_unblocked_by_iret(), low / 4096 == 1);
                let again =
                    InterruptionInfo::inject(info.kind(), info.vector(), info.has_error_code());
                assert_eq!(again.0, info.for_entry() | 1 << 31);
                assert_eq!(info.for_entry(), valid | (low & 0xfff));
            }
        }
    }

    #[test]
    fn io_qualifications_decode() {
        for port in (0..0x400).chain([0xcf8, 0x7fff, 0x8000, 0xffff]) {
            for (low, noise) in (0..1 << 5).flat_map(|low| NOISE.map(|noise| (low, noise))) {
                let unused = noise & !0xffff_001f;
                let io = IoQualification(unused | u64::from(port) << 16 | low);
                assert_eq!(io.port(), port);
                assert_eq!(u64::from(io.size()), low % 8 + 1);
                assert_eq!((io.is_in(), io.is_string()), (low / 8 % 2 == 1, low / 16 == 1));
            }
        }
    }

    #[test]
    fn cr_qualifications_decode() {
        for low in 0..1u64 << 12 {
            for source in [0, 1, 0x7fff, 0x8000, 0xffff] {
                for noise in NOISE {
                    let unused = noise & !0xffff_0f3f;
                    let cr = CrQualification(unused | source << 16 | low & 0xf3f);
                    assert_eq!(u64::from(cr.register()), low % 16);
                    assert_eq!(cr.operand() as u64, low / 256);
                    let access = [
                        CrAccess::Write,
                        CrAccess::Read,
                        CrAccess::Clts,
                        CrAccess::Lmsw(source as u16),
                    ];
                    assert_eq!(cr.access(), access[(low / 16 % 4) as usize]);
                }
            }
        }
    }

    #[test]
    fn ept_qualifications_decode() {
        for (low, noise) in (0u64..1 << 13).flat_map(|low| NOISE.map(|noise| (low, noise))) {
            let ept = EptQualification(noise & !0x1fff | low);
            let access = u64::from(ept.is_read())
                + 2 * u64::from(ept.is_write())
                + 4 * u64::from(ept.is_fetch());
            assert_eq!(access, low % 8);
            assert_eq!(ept.nmi_unblocked_by_iret(), low / 4096 == 1);
        }
    }

    proptest! {
        #[test]
        fn reasons_decode(bits: u32) {
            let reason = ExitReason(bits);
            prop_assert_eq!(reason.is_entry_failure(), bits >= 0x8000_0000);
            prop_assert_eq!(u32::from(reason.basic().0), bits % 0x1_0000);
        }
    }
}
