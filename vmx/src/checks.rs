//! Why VM entry refused a guest's state: the CPU's own checks, done again in software.
//!
//! An entry that fails with basic reason 33 says that the guest-state area is invalid, not what in
//! it. The rules are those of SDM volume 3, chapter "VM Entries", section "Checks on the Guest
//! State Area", in its order. Such a failure leaves the guest-state area and the event to inject as
//! they were (section "VM-Entry Failures During or After Loading Guest State"), so what is read
//! here is what the CPU read.
//!
//! Left out is what this hypervisor cannot get wrong: state behind entry controls that it never
//! sets (bound registers, performance monitoring, processor trace, CET, LBR, protection keys, user
//! interrupts, FRED) and entries inside SMM. Left out too is what lies in memory: the revision
//! identifier behind the VMCS link pointer, PDPTEs without EPT.

use core::fmt;

use raw_cpuid::CpuIdReader;

use crate::capability::Capabilities;
use crate::controls::{Entry, PinBased, Primary, Secondary};
use crate::exit::{EventKind, InterruptionInfo, vector};
use crate::fields::*;
use crate::run::{BLOCKING_NMI, PENDING_DEBUG_BS};
use crate::setup::*;

/// A VMCS field, or a number that the CPU enumerates, with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// The name.
    pub name: &'static str,
    /// The value.
    pub value: u64,
}

impl Named {
    fn read<W: Width, A: Access>(vmcs: &impl VmcsRead, field: Field<W, A>) -> Self {
        Self { name: field.name(), value: vmcs.read(field).into() }
    }

    /// Whether any of `bits` is 1.
    const fn has(self, bits: u64) -> bool {
        self.value & bits != 0
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {:#x}", self.name, self.value)
    }
}

/// A rule that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation<'a> {
    /// What it speaks of: first the field under whose name the SDM has the rule, then those that
    /// it is compared with.
    pub fields: &'a [Named],
    /// The rule, in words.
    pub rule: &'static str,
    /// The SDM's subsection.
    pub section: &'static str,
}

impl fmt::Display for Violation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for field in self.fields {
            write!(f, "{separator}{field}")?;
            separator = ", ";
        }
        write!(f, ": {} (SDM volume 3, section \"{}\")", self.rule, self.section)
    }
}

/// What [`diagnose`] has to say about an invalid state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding<'a> {
    /// This rule is broken.
    Broken(&'a Violation<'a>),
    /// No rule that this program knows is broken.
    Nothing {
        /// What the CPU said: SDM volume 3, section "VM-Entry Failures During or After Loading
        /// Guest State".
        exit_qualification: u64,
    },
}

impl fmt::Display for Finding<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Broken(violation) => violation.fmt(f),
            Self::Nothing { exit_qualification } => {
                let meaning = match exit_qualification {
                    0 => "no hint",
                    2 => "the PDPTEs",
                    3 => "an NMI injected under blocking by STI",
                    4 => "the VMCS link pointer",
                    _ => "unknown",
                };
                write!(
                    f,
                    "no rule known to this program is broken; the exit qualification is \
                     {exit_qualification}: {meaning}"
                )
            }
        }
    }
}

/// What CPUID says of the widths of addresses and of the bits that only some CPUs have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processor {
    /// MAXPHYADDR.
    physical_bits: u32,
    /// The most that any paging mode translates. VM entry looks at this width, not at CR4.LA57.
    linear_bits: u32,
    /// Bits above MAXPHYADDR that CR3 may have.
    cr3_high: u64,
    /// Bits that IA32_EFER may have.
    efer: u64,
    /// Bits that IA32_DEBUGCTL may have. CPUID does not tell them all: bits that exist on some
    /// CPUs pass on all.
    debugctl: u64,
    /// Bits that the pending debug exceptions may have.
    pending_debug: u64,
    /// Bits that the interruptibility state may have.
    interruptibility: u64,
}

impl Processor {
    /// Asks CPUID: SDM volume 2, "CPUID—CPU Identification".
    pub fn read(cpu: &impl CpuIdReader) -> Self {
        // Every CPU with long mode has these two leaves.
        let widths = cpu.cpuid1(0x8000_0008).eax;
        let extended = cpu.cpuid1(0x8000_0001).edx;
        let (mut seven, mut seven_1) = (0, 0);
        if cpu.cpuid1(0).eax >= 7 {
            let leaf = cpu.cpuid2(7, 0);
            seven = u64::from(leaf.ecx) << 32 | u64::from(leaf.ebx);
            if leaf.eax >= 1 {
                seven_1 = cpu.cpuid2(7, 1).eax;
            }
        }
        // `bits` if that bit of the register is 1.
        let when = |register: u64, bit: u32, bits: u64| {
            if register >> bit & 1 != 0 { bits } else { 0 }
        };
        let sgx = |bits| when(seven, 2, bits);
        let rtm = |bits| when(seven, 11, bits);
        let bus_lock_detection = |bits| when(seven, 32 + 24, bits);
        Self {
            physical_bits: widths & 0xff,
            linear_bits: widths >> 8 & 0xff,
            // LAM_U57 and LAM_U48.
            cr3_high: when(seven_1.into(), 26, 3 << 61),
            // SCE; NXE; LME and LMA.
            efer: when(extended.into(), 11, 1)
                | when(extended.into(), 20, 1 << 11)
                | when(extended.into(), 29, EFER_LME | EFER_LMA),
            // LBR and BTF; TR to FREEZE_WHILE_SMM; BLD; RTM_DEBUG.
            debugctl: 3 | 0x1ff << 6 | bus_lock_detection(1 << 2) | rtm(1 << 15),
            // B0 to B3; enabled breakpoint; BS; BLD; RTM.
            pending_debug: 0xf
                | 1 << 12
                | PENDING_DEBUG_BS
                | bus_lock_detection(1 << 11)
                | rtm(PENDING_DEBUG_RTM),
            // STI, MOV SS, SMI, NMI; enclave interruption.
            interruptibility: 0xf | sgx(ENCLAVE_INTERRUPTION),
        }
    }

    /// Whether bits 63:N-1 are identical, N being the width of linear addresses.
    fn is_canonical(&self, address: Named) -> bool {
        identical_from(address.value, self.linear_bits.saturating_sub(1))
    }

    fn linear_width(&self) -> Named {
        Named { name: "linear-address width", value: self.linear_bits.into() }
    }

    fn is_physical(&self, address: u64) -> bool {
        address & bits_from(self.physical_bits) == 0
    }
}

/// The bits from `bit` on.
const fn bits_from(bit: u32) -> u64 {
    if bit < 64 { u64::MAX << bit } else { 0 }
}

/// Whether the bits from `bit` on are identical. There is nothing to compare bit 63 with.
fn identical_from(value: u64, bit: u32) -> bool {
    let mask = bits_from(bit);
    value & mask == 0 || value & mask == mask
}

const CR0_WP: u64 = 1 << 16;
const CR4_CET: u64 = 1 << 23;
const DEBUGCTL_BTF: u64 = 1 << 1;
/// RFLAGS: bits 63:22, 15, 5 and 3.
const RFLAGS_RESERVED: u64 = bits_from(22) | 1 << 15 | 1 << 5 | 1 << 3;
/// Pending debug exceptions: inside an RTM region.
const PENDING_DEBUG_RTM: u64 = 1 << 16;
/// Pending debug exceptions: an enabled breakpoint was met.
const PENDING_DEBUG_ENABLED: u64 = 1 << 12;
/// Interruptibility state: blocking by STI.
const BLOCKING_STI: u64 = 1 << 0;
/// Interruptibility state: blocking by MOV SS.
const BLOCKING_MOV_SS: u64 = 1 << 1;
/// Interruptibility state: blocking by SMI.
const BLOCKING_SMI: u64 = 1 << 2;
/// Interruptibility state.
const ENCLAVE_INTERRUPTION: u64 = 1 << 4;
/// Activity states: SDM volume 3, section "Guest Non-Register State". 0 is active.
const HLT: u64 = 1;
const SHUTDOWN: u64 = 2;
const WAIT_FOR_SIPI: u64 = 3;
/// PDPTE, present: bits 2:1 and 8:5. SDM volume 3, section "PDPTE Registers".
const PDPTE_RESERVED: u64 = 0x1e6;

/// Access rights: SDM volume 3, section "Guest Register State".
mod rights {
    pub const S: u64 = 1 << 4;
    pub const P: u64 = 1 << 7;
    pub const L: u64 = 1 << 13;
    pub const DB: u64 = 1 << 14;
    pub const G: u64 = 1 << 15;
    pub const UNUSABLE: u64 = 1 << 16;
    /// Bits 11:8 and 31:17.
    pub const RESERVED: u64 = 0xfffe_0f00;
    /// The only value in virtual-8086 mode: type 3, S, DPL 3, P.
    pub const VIRTUAL_8086: u64 = 0xf3;
}

// Places in `GUEST_SEGMENTS`.
const ES: usize = 0;
const CS: usize = 1;
const SS: usize = 2;
const DS: usize = 3;
const FS: usize = 4;
const GS: usize = 5;
const LDTR: usize = 6;
const TR: usize = 7;

/// A segment register's fields.
#[derive(Debug, Clone, Copy)]
struct Segment {
    selector: Named,
    base: Named,
    limit: Named,
    rights: Named,
}

impl Segment {
    fn read(vmcs: &impl VmcsRead, fields: &SegmentFields) -> Self {
        Self {
            selector: Named::read(vmcs, fields.selector),
            base: Named::read(vmcs, fields.base),
            limit: Named::read(vmcs, fields.limit),
            rights: Named::read(vmcs, fields.rights),
        }
    }

    const fn kind(&self) -> u64 {
        self.rights.value & 0xf
    }

    const fn dpl(&self) -> u64 {
        self.rights.value >> 5 & 3
    }

    const fn rpl(&self) -> u64 {
        self.selector.value & 3
    }
}

/// What rules of more than one subsection look at.
struct Guest<'a> {
    cpu: &'a Processor,
    entry: Named,
    event: Named,
    cr0: Named,
    cr4: Named,
    rflags: Named,
    debugctl: Named,
    segments: [Segment; 8],
    unrestricted: bool,
    ept: bool,
}

impl<'a> Guest<'a> {
    fn read(vmcs: &impl VmcsRead, cpu: &'a Processor) -> Self {
        // The field exists only where the CPU can activate it.
        let primary = Primary::from_bits_retain(vmcs.read(PRIMARY_CONTROLS));
        let secondary = if primary.contains(Primary::ACTIVATE_SECONDARY) {
            Secondary::from_bits_retain(vmcs.read(SECONDARY_CONTROLS))
        } else {
            Secondary::empty()
        };
        Self {
            cpu,
            entry: Named::read(vmcs, ENTRY_CONTROLS),
            event: Named::read(vmcs, ENTRY_INTERRUPTION_INFO),
            cr0: Named::read(vmcs, GUEST_CR0),
            cr4: Named::read(vmcs, GUEST_CR4),
            rflags: Named::read(vmcs, GUEST_RFLAGS),
            debugctl: Named::read(vmcs, GUEST_IA32_DEBUGCTL),
            segments: GUEST_SEGMENTS.map(|fields| Segment::read(vmcs, &fields)),
            unrestricted: secondary.contains(Secondary::UNRESTRICTED_GUEST),
            ept: secondary.contains(Secondary::ENABLE_EPT),
        }
    }

    fn enters(&self, control: Entry) -> bool {
        self.entry.has(control.bits().into())
    }

    /// "The guest will be IA-32e mode."
    fn ia32e(&self) -> bool {
        self.enters(Entry::IA32E_MODE_GUEST)
    }

    /// The event that the entry is to inject.
    fn injected(&self) -> Option<(EventKind, u8)> {
        let info = InterruptionInfo(self.event.value as u32);
        info.is_valid().then(|| (info.kind(), info.vector()))
    }

    fn injects(&self, kind: EventKind) -> bool {
        self.injected().is_some_and(|event| event.0 == kind)
    }
}

/// One of a segment register's fields.
#[derive(Debug, Clone, Copy)]
enum Part {
    Selector,
    Base,
    Limit,
    Rights,
}
use Part::*;

/// A rule on segment registers.
#[derive(Clone, Copy)]
struct Row {
    registers: &'static [usize],
    part: Part,
    rule: &'static str,
    holds: fn(&Segment, &Guest<'_>) -> bool,
    /// What the part is compared with.
    with: Option<fn(&Segment, &Guest<'_>) -> Named>,
    /// Does not apply to an unusable register. CS and TR are never excused.
    if_usable: bool,
}

const fn row(
    registers: &'static [usize],
    part: Part,
    rule: &'static str,
    holds: fn(&Segment, &Guest<'_>) -> bool,
) -> Row {
    Row { registers, part, rule, holds, with: None, if_usable: false }
}

impl Row {
    const fn with(self, with: fn(&Segment, &Guest<'_>) -> Named) -> Self {
        Self { with: Some(with), ..self }
    }

    const fn if_usable(self) -> Self {
        Self { if_usable: true, ..self }
    }
}

const CODE_AND_DATA: &[usize] = &[CS, SS, DS, ES, FS, GS];
const DATA_BUT_SS: &[usize] = &[DS, ES, FS, GS];

const PRESENT: &str = "P must be 1";
const RESERVED: &str = "the reserved bits 11:8 and 31:17 must be 0";
const BYTES: &str = "G must be 0 unless bits 11:0 of the limit are all 1";
const PAGES: &str = "G must be 1 if any of bits 31:20 of the limit is 1";
const CANONICAL: &str = "the address must be canonical";

fn is_present(segment: &Segment, _: &Guest<'_>) -> bool {
    segment.rights.has(rights::P)
}

fn reserved_is_0(segment: &Segment, _: &Guest<'_>) -> bool {
    !segment.rights.has(rights::RESERVED)
}

fn limit_fits_bytes(segment: &Segment, _: &Guest<'_>) -> bool {
    !segment.rights.has(rights::G) || segment.limit.value & 0xfff == 0xfff
}

fn limit_fits_pages(segment: &Segment, _: &Guest<'_>) -> bool {
    segment.rights.has(rights::G) || segment.limit.value >> 20 == 0
}

fn base_is_canonical(segment: &Segment, guest: &Guest<'_>) -> bool {
    guest.cpu.is_canonical(segment.base)
}

/// "If the guest will be virtual-8086": nothing else is then left to check in these registers.
const VIRTUAL_8086: [Row; 3] = [
    row(
        CODE_AND_DATA,
        Base,
        "in virtual-8086 mode the base must be the selector times 16",
        |s, _| s.base.value == s.selector.value << 4,
    )
    .with(|s, _| s.selector),
    row(CODE_AND_DATA, Limit, "in virtual-8086 mode the limit must be 0xffff", |s, _| {
        s.limit.value == 0xffff
    }),
    row(CODE_AND_DATA, Rights, "in virtual-8086 mode the access rights must be 0xf3", |s, _| {
        s.rights.value == rights::VIRTUAL_8086
    }),
];

/// "If the guest will not be virtual-8086."
const NOT_VIRTUAL_8086: [Row; 20] = [
    row(&[SS], Selector, "RPL must be that of CS, the guest not being unrestricted", |s, g| {
        g.unrestricted || s.rpl() == g.segments[CS].rpl()
    })
    .with(|_, g| g.segments[CS].selector),
    // Always: the bases are MSRs too, and loaded even if the register is unusable.
    row(&[FS, GS], Base, CANONICAL, base_is_canonical).with(|_, g| g.cpu.linear_width()),
    row(&[CS, SS, DS, ES], Base, "bits 63:32 must be 0", |s, _| s.base.value >> 32 == 0)
        .if_usable(),
    row(
        &[CS],
        Rights,
        "the type must be 9, 11, 13 or 15 (accessed code) or, in an unrestricted guest, 3 \
         (accessed read/write data)",
        |s, g| matches!(s.kind(), 9 | 11 | 13 | 15) || s.kind() == 3 && g.unrestricted,
    ),
    row(&[SS], Rights, "the type must be 3 or 7 (accessed read/write data)", |s, _| {
        matches!(s.kind(), 3 | 7)
    })
    .if_usable(),
    row(DATA_BUT_SS, Rights, "the type must be an accessed one: bit 0 must be 1", |s, _| {
        s.kind() & 1 != 0
    })
    .if_usable(),
    row(
        DATA_BUT_SS,
        Rights,
        "the type, if it is code, must be readable: bit 1 must be 1",
        |s, _| s.kind() & 0xa != 8,
    )
    .if_usable(),
    row(CODE_AND_DATA, Rights, "S must be 1", |s, _| s.rights.has(rights::S)).if_usable(),
    row(&[CS], Rights, "DPL must be 0 with type 3", |s, _| s.kind() != 3 || s.dpl() == 0),
    row(&[CS], Rights, "DPL must be that of SS with type 9 or 11 (non-conforming)", |s, g| {
        !matches!(s.kind(), 9 | 11) || s.dpl() == g.segments[SS].dpl()
    })
    .with(|_, g| g.segments[SS].rights),
    row(&[CS], Rights, "DPL must not exceed that of SS with type 13 or 15 (conforming)", |s, g| {
        !matches!(s.kind(), 13 | 15) || s.dpl() <= g.segments[SS].dpl()
    })
    .with(|_, g| g.segments[SS].rights),
    // SS.DPL is the CPL, so the next three hold for an unusable SS as well.
    row(
        &[SS],
        Rights,
        "DPL must be the selector's RPL, the guest not being unrestricted",
        |s, g| g.unrestricted || s.dpl() == s.rpl(),
    )
    .with(|s, _| s.selector),
    row(&[SS], Rights, "DPL must be 0 if the type of CS is 3", |s, g| {
        g.segments[CS].kind() != 3 || s.dpl() == 0
    })
    .with(|_, g| g.segments[CS].rights),
    row(&[SS], Rights, "DPL must be 0 if CR0.PE is 0", |s, g| g.cr0.has(CR0_PE) || s.dpl() == 0)
        .with(|_, g| g.cr0),
    row(
        DATA_BUT_SS,
        Rights,
        "DPL must not be below the selector's RPL with type 0 to 11, the guest not being \
         unrestricted",
        |s, g| g.unrestricted || s.kind() > 11 || s.dpl() >= s.rpl(),
    )
    .with(|s, _| s.selector)
    .if_usable(),
    row(CODE_AND_DATA, Rights, PRESENT, is_present).if_usable(),
    row(CODE_AND_DATA, Rights, RESERVED, reserved_is_0).if_usable(),
    row(&[CS], Rights, "D/B must be 0 in 64-bit mode, where L is 1", |s, g| {
        !(g.ia32e() && s.rights.has(rights::L) && s.rights.has(rights::DB))
    }),
    row(CODE_AND_DATA, Rights, BYTES, limit_fits_bytes).with(|s, _| s.limit).if_usable(),
    row(CODE_AND_DATA, Rights, PAGES, limit_fits_pages).with(|s, _| s.limit).if_usable(),
];

/// TR and LDTR, in every mode.
const SYSTEM: [Row; 10] = [
    row(&[TR, LDTR], Selector, "TI must be 0", |s, _| !s.selector.has(1 << 2)).if_usable(),
    row(&[TR, LDTR], Base, CANONICAL, base_is_canonical)
        .with(|_, g| g.cpu.linear_width())
        .if_usable(),
    row(
        &[TR],
        Rights,
        "the type must be 11 (busy TSS) or, outside IA-32e mode, 3 (busy 16-bit TSS)",
        |s, g| s.kind() == 11 || s.kind() == 3 && !g.ia32e(),
    ),
    row(&[LDTR], Rights, "the type must be 2 (LDT)", |s, _| s.kind() == 2).if_usable(),
    row(&[TR, LDTR], Rights, "S must be 0", |s, _| !s.rights.has(rights::S)).if_usable(),
    row(&[TR, LDTR], Rights, PRESENT, is_present).if_usable(),
    row(&[TR, LDTR], Rights, RESERVED, reserved_is_0).if_usable(),
    row(&[TR, LDTR], Rights, BYTES, limit_fits_bytes).with(|s, _| s.limit).if_usable(),
    row(&[TR, LDTR], Rights, PAGES, limit_fits_pages).with(|s, _| s.limit).if_usable(),
    row(&[TR], Rights, "TR must be usable", |s, _| !s.rights.has(rights::UNUSABLE)),
];

/// The checks under way.
struct Rules<'a, V, R> {
    vmcs: &'a V,
    caps: &'a Capabilities,
    guest: Guest<'a>,
    section: &'static str,
    report: R,
}

/// Names every rule on the guest-state area that the current VMCS breaks, in the SDM's order.
///
/// Reads no field that a CPU without the feature behind it would lack, provided that the controls
/// in the VMCS are supported (VM entry has looked at those first).
pub fn check(
    vmcs: &impl VmcsRead,
    caps: &Capabilities,
    cpu: &Processor,
    report: impl FnMut(&Violation<'_>),
) {
    let guest = Guest::read(vmcs, cpu);
    let mut rules = Rules { vmcs, caps, guest, section: "", report };
    rules.section = "Checks on Guest Control Registers, Debug Registers, and MSRs";
    rules.registers_and_msrs();
    rules.section = "Checks on Guest Segment Registers";
    rules.segments();
    rules.section = "Checks on Guest Descriptor-Table Registers";
    rules.descriptor_tables();
    rules.section = "Checks on Guest RIP, RFLAGS, and SSP";
    rules.rip_and_rflags();
    rules.section = "Checks on Guest Non-Register State";
    rules.activity();
    rules.interruptibility();
    rules.pending_debug();
    rules.link_pointer();
    rules.section = "Checks on Guest Page-Directory-Pointer-Table Entries";
    rules.pdptes();
}

/// [`check`] after a VM entry that failed with
/// [`INVALID_GUEST_STATE`](crate::exit::BasicReason::INVALID_GUEST_STATE): `report` is called at
/// least once.
pub fn diagnose(
    vmcs: &impl VmcsRead,
    caps: &Capabilities,
    cpu: &Processor,
    mut report: impl FnMut(&Finding<'_>),
) {
    let mut found = false;
    check(vmcs, caps, cpu, |violation| {
        found = true;
        report(&Finding::Broken(violation));
    });
    if !found {
        report(&Finding::Nothing { exit_qualification: vmcs.read(EXIT_QUALIFICATION) });
    }
}

impl<V: VmcsRead, R: FnMut(&Violation<'_>)> Rules<'_, V, R> {
    fn get<W: Width, A: Access>(&self, field: Field<W, A>) -> Named {
        Named::read(self.vmcs, field)
    }

    fn require(&mut self, holds: bool, fields: &[Named], rule: &'static str) {
        if !holds {
            (self.report)(&Violation { fields, rule, section: self.section });
        }
    }

    fn require_canonical(&mut self, field: Field<Natural>) {
        let address = self.get(field);
        let cpu = self.guest.cpu;
        self.require(cpu.is_canonical(address), &[address, cpu.linear_width()], CANONICAL);
    }

    fn registers_and_msrs(&mut self) {
        let Guest { cpu, entry, cr0, cr4, debugctl, unrestricted, .. } = self.guest;
        let ia32e = self.guest.ia32e();

        // VM entry leaves NW and CD as they are, so it does not look at them.
        let unchecked = CR0_NW | CR0_CD;
        let may_be_0 = if unrestricted { unchecked | CR0_PE | CR0_PG } else { unchecked };
        let cr0_1 = Named { name: "IA32_VMX_CR0_FIXED0", value: self.caps.cr0_fixed0 };
        let cr0_0 = Named { name: "IA32_VMX_CR0_FIXED1", value: self.caps.cr0_fixed1 };
        let cr4_1 = Named { name: "IA32_VMX_CR4_FIXED0", value: self.caps.cr4_fixed0 };
        let cr4_0 = Named { name: "IA32_VMX_CR4_FIXED1", value: self.caps.cr4_fixed1 };
        self.require(
            !cr0.value & cr0_1.value & !may_be_0 == 0,
            &[cr0, cr0_1],
            "bits that are 1 in IA32_VMX_CR0_FIXED0 must be 1 (in an unrestricted guest, but for \
             PE and PG)",
        );
        self.require(
            cr0.value & !cr0_0.value & !unchecked == 0,
            &[cr0, cr0_0],
            "bits that are 0 in IA32_VMX_CR0_FIXED1 must be 0",
        );
        self.require(!cr0.has(CR0_PG) || cr0.has(CR0_PE), &[cr0], "PE must be 1 if PG is 1");
        self.require(
            !cr4.value & cr4_1.value == 0,
            &[cr4, cr4_1],
            "bits that are 1 in IA32_VMX_CR4_FIXED0 must be 1",
        );
        self.require(
            cr4.value & !cr4_0.value == 0,
            &[cr4, cr4_0],
            "bits that are 0 in IA32_VMX_CR4_FIXED1 must be 0",
        );
        self.require(
            !cr4.has(CR4_CET) || cr0.has(CR0_WP),
            &[cr4, cr0],
            "CET must be 0 if CR0.WP is 0",
        );
        self.require(
            !ia32e || cr0.has(CR0_PG),
            &[cr0, entry],
            "PG must be 1 if the entry is to IA-32e mode",
        );
        self.require(
            !ia32e || cr4.has(CR4_PAE),
            &[cr4, entry],
            "PAE must be 1 if the entry is to IA-32e mode",
        );
        self.require(
            ia32e || !cr4.has(CR4_PCIDE),
            &[cr4, entry],
            "PCIDE must be 0 unless the entry is to IA-32e mode",
        );
        let cr3 = self.get(GUEST_CR3);
        self.require(
            cpu.is_physical(cr3.value & !cpu.cr3_high),
            &[cr3, Named { name: "MAXPHYADDR", value: cpu.physical_bits.into() }],
            "bits from MAXPHYADDR on must be 0 (but for LAM_U48 and LAM_U57, where they exist)",
        );

        if self.guest.enters(Entry::LOAD_DEBUG_CONTROLS) {
            self.require(
                debugctl.value & !cpu.debugctl == 0,
                &[debugctl],
                "reserved bits of IA32_DEBUGCTL must be 0",
            );
            let dr7 = self.get(GUEST_DR7);
            self.require(dr7.value >> 32 == 0, &[dr7], "bits 63:32 must be 0");
        }
        self.require_canonical(GUEST_SYSENTER_ESP);
        self.require_canonical(GUEST_SYSENTER_EIP);
        if self.guest.enters(Entry::LOAD_PAT) {
            let pat = self.get(GUEST_IA32_PAT);
            self.require(
                pat.value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)),
                &[pat],
                "each byte must be a memory type: 0 (UC), 1 (WC), 4 (WT), 5 (WP), 6 (WB), 7 (UC-)",
            );
        }
        if self.guest.enters(Entry::LOAD_EFER) {
            let efer = self.get(GUEST_IA32_EFER);
            self.require(
                efer.value & !cpu.efer == 0,
                &[efer],
                "reserved bits of IA32_EFER must be 0",
            );
            let active = efer.has(EFER_LMA);
            self.require(
                active == ia32e,
                &[efer, entry],
                "LMA must be 1 if, and only if, the entry is to IA-32e mode",
            );
            self.require(
                !cr0.has(CR0_PG) || active == efer.has(EFER_LME),
                &[efer, cr0],
                "LMA and LME must be equal if CR0.PG is 1",
            );
        }
    }

    fn segments(&mut self) {
        let modal: &[Row] =
            if self.guest.rflags.has(RFLAGS_VM) { &VIRTUAL_8086 } else { &NOT_VIRTUAL_8086 };
        for row in modal.iter().chain(&SYSTEM) {
            for &register in row.registers {
                let segment = self.guest.segments[register];
                let never_excused = matches!(register, CS | TR);
                if row.if_usable && segment.rights.has(rights::UNUSABLE) && !never_excused {
                    continue;
                }
                let holds = (row.holds)(&segment, &self.guest);
                let subject = match row.part {
                    Selector => segment.selector,
                    Base => segment.base,
                    Limit => segment.limit,
                    Rights => segment.rights,
                };
                match row.with {
                    Some(with) => {
                        let other = with(&segment, &self.guest);
                        self.require(holds, &[subject, other], row.rule);
                    }
                    None => self.require(holds, &[subject], row.rule),
                }
            }
        }
    }

    fn descriptor_tables(&mut self) {
        for (base, limit) in
            [(GUEST_GDTR_BASE, GUEST_GDTR_LIMIT), (GUEST_IDTR_BASE, GUEST_IDTR_LIMIT)]
        {
            self.require_canonical(base);
            let limit = self.get(limit);
            self.require(limit.value >> 16 == 0, &[limit], "bits 31:16 must be 0");
        }
    }

    fn rip_and_rflags(&mut self) {
        let Guest { cpu, entry, event, cr0, rflags, .. } = self.guest;
        let cs = self.guest.segments[CS].rights;
        let rip = self.get(GUEST_RIP);
        if self.guest.ia32e() && cs.has(rights::L) {
            // One bit short of canonical: a guest may have run up to the end of the lower half,
            // and is to get its #GP after the entry.
            self.require(
                identical_from(rip.value, cpu.linear_bits),
                &[rip, cpu.linear_width()],
                "bits above the width of linear addresses must be identical",
            );
        } else {
            self.require(
                rip.value >> 32 == 0,
                &[rip, entry, cs],
                "bits 63:32 must be 0 outside 64-bit mode (IA-32e mode with CS.L = 1)",
            );
        }
        self.require(
            !rflags.has(RFLAGS_RESERVED) && rflags.has(RFLAGS_FIXED),
            &[rflags],
            "the reserved bits 63:22, 15, 5 and 3 must be 0, bit 1 must be 1",
        );
        self.require(
            !rflags.has(RFLAGS_VM) || !self.guest.ia32e(),
            &[rflags, entry],
            "VM must be 0 if the entry is to IA-32e mode",
        );
        self.require(
            !rflags.has(RFLAGS_VM) || cr0.has(CR0_PE),
            &[rflags, cr0],
            "VM must be 0 if CR0.PE is 0",
        );
        self.require(
            !self.guest.injects(EventKind::External) || rflags.has(RFLAGS_IF),
            &[rflags, event],
            "IF must be 1 if an external interrupt is injected",
        );
    }

    fn activity(&mut self) {
        let state = self.get(GUEST_ACTIVITY_STATE);
        let blocking = self.get(GUEST_INTERRUPTIBILITY);
        let ss = self.guest.segments[SS];
        // IA32_VMX_MISC, bits 8:6: HLT, shutdown, wait-for-SIPI.
        let supported = 1 | (self.caps.misc >> 6 & 7) << 1;
        self.require(
            state.value <= WAIT_FOR_SIPI && supported >> state.value & 1 != 0,
            &[state],
            "the activity state must be one that IA32_VMX_MISC says is supported",
        );
        self.require(
            state.value != HLT || ss.dpl() == 0,
            &[state, ss.rights],
            "the activity state must not be HLT if the DPL of SS is not 0",
        );
        self.require(
            state.value == 0 || !blocking.has(BLOCKING_STI | BLOCKING_MOV_SS),
            &[state, blocking],
            "the activity state must be active under blocking by STI or MOV SS",
        );
        if let Some((kind, number)) = self.guest.injected() {
            let machine_check = kind == EventKind::HardwareException && number == vector::MC;
            let deliverable = match state.value {
                HLT => {
                    matches!(kind, EventKind::External | EventKind::Nmi)
                        || machine_check
                        || kind == EventKind::HardwareException && number == vector::DB
                        // A pending monitor trap.
                        || kind == EventKind::Other && number == 0
                }
                SHUTDOWN => kind == EventKind::Nmi || machine_check,
                WAIT_FOR_SIPI => false,
                _ => true,
            };
            self.require(
                deliverable,
                &[state, self.guest.event],
                "the injected event must be one that the activity state does not block",
            );
        }
    }

    fn interruptibility(&mut self) {
        let Guest { cpu, event, rflags, .. } = self.guest;
        let blocking = self.get(GUEST_INTERRUPTIBILITY);
        let pin = self.get(PIN_BASED_CONTROLS);
        self.require(
            blocking.value & !cpu.interruptibility == 0,
            &[blocking],
            "reserved bits (31:5; bit 4 too on a CPU without SGX) must be 0",
        );
        self.require(
            !(blocking.has(BLOCKING_STI) && blocking.has(BLOCKING_MOV_SS)),
            &[blocking],
            "blocking by STI and by MOV SS must not both be 1",
        );
        self.require(
            !blocking.has(BLOCKING_STI) || rflags.has(RFLAGS_IF),
            &[blocking, rflags],
            "blocking by STI must be 0 if RFLAGS.IF is 0",
        );
        self.require(
            !blocking.has(BLOCKING_STI | BLOCKING_MOV_SS)
                || !self.guest.injects(EventKind::External),
            &[blocking, event],
            "blocking by STI and by MOV SS must be 0 if an external interrupt is injected",
        );
        let nmi = self.guest.injects(EventKind::Nmi);
        // Older editions of the SDM leave STI to the CPU.
        self.require(
            !blocking.has(BLOCKING_STI | BLOCKING_MOV_SS) || !nmi,
            &[blocking, event],
            "blocking by STI and by MOV SS must be 0 if an NMI is injected",
        );
        // Without virtual NMIs the bit says nothing about the guest.
        let virtual_nmis = pin.has(PinBased::VIRTUAL_NMIS.bits().into());
        self.require(
            !(blocking.has(BLOCKING_NMI.into()) && virtual_nmis && nmi),
            &[blocking, event, pin],
            "blocking by NMI must be 0 if there are virtual NMIs and an NMI is injected",
        );
        self.require(
            !blocking.has(BLOCKING_SMI),
            &[blocking],
            "blocking by SMI must be 0 outside SMM",
        );
        self.require(
            !(blocking.has(ENCLAVE_INTERRUPTION) && blocking.has(BLOCKING_MOV_SS)),
            &[blocking],
            "blocking by MOV SS must be 0 with an enclave interruption",
        );
    }

    fn pending_debug(&mut self) {
        let Guest { cpu, rflags, debugctl, .. } = self.guest;
        let pending = self.get(GUEST_PENDING_DEBUG);
        let blocking = self.get(GUEST_INTERRUPTIBILITY);
        let activity = self.get(GUEST_ACTIVITY_STATE);
        self.require(
            pending.value & !cpu.pending_debug == 0,
            &[pending],
            "reserved bits must be 0 (also bit 11 without bus-lock detection, 16 without RTM)",
        );
        // The last instruction was STI, a load of SS, or HLT: with TF, its single step is pending.
        if blocking.has(BLOCKING_STI | BLOCKING_MOV_SS) || activity.value == HLT {
            let steps = rflags.has(RFLAGS_TF) && !debugctl.has(DEBUGCTL_BTF);
            self.require(
                pending.has(PENDING_DEBUG_BS) == steps,
                &[pending, rflags, debugctl, blocking, activity],
                "under blocking by STI or MOV SS and in the HLT state, BS must be 1 if RFLAGS.TF \
                 is 1 and IA32_DEBUGCTL.BTF is 0, and 0 otherwise",
            );
        }
        if pending.has(PENDING_DEBUG_RTM) {
            self.require(
                pending.value == PENDING_DEBUG_RTM | PENDING_DEBUG_ENABLED,
                &[pending],
                "with RTM, the enabled-breakpoint bit must be 1 and all others 0",
            );
            self.require(
                !blocking.has(BLOCKING_MOV_SS),
                &[pending, blocking],
                "RTM must be 0 under blocking by MOV SS",
            );
        }
    }

    fn link_pointer(&mut self) {
        let link = self.get(VMCS_LINK_POINTER);
        // IA32_VMX_BASIC, bit 48: VMX structures lie below 4 GiB.
        let low_only = self.caps.basic & 1 << 48 != 0;
        let width = if low_only { 32 } else { self.guest.cpu.physical_bits };
        self.require(
            link.value == u64::MAX || link.value & (0xfff | bits_from(width)) == 0,
            &[link],
            "the VMCS link pointer must be all 1s, or the physical address of a page",
        );
    }

    fn pdptes(&mut self) {
        let Guest { cpu, cr0, cr4, ept, .. } = self.guest;
        if !ept || !cr0.has(CR0_PG) || !cr4.has(CR4_PAE) || self.guest.ia32e() {
            return;
        }
        for field in [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3] {
            let entry = self.get(field);
            let reserved_is_0 = !entry.has(PDPTE_RESERVED) && cpu.is_physical(entry.value);
            self.require(
                !entry.has(1) || reserved_is_0,
                &[entry],
                "a PDPTE that is present must have 0 in bits 2:1, 8:5 and from MAXPHYADDR on",
            );
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
