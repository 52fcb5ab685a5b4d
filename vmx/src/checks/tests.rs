//! The checks against valid states, and against states with one thing wrong.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::string::{String, ToString};
use std::vec::Vec;

use proptest::prelude::*;
use raw_cpuid::CpuIdResult;

use super::*;
use crate::capability::msr;
use crate::setup::{Cr4, Pointers, flat_protected, initialize, startup};

/// A VMCS that has the fields that were written, and no others.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Recorded(pub(crate) BTreeMap<u32, u64>);

impl VmcsRead for Recorded {
    fn read<W: Width, A: Access>(&self, field: Field<W, A>) -> W::Value {
        let value = self.0.get(&field.encoding());
        W::from_register(*value.unwrap_or_else(|| panic!("{} does not exist", field.name())))
    }
}

impl VmcsWrite for Recorded {
    fn write<W: Width>(&mut self, field: Field<W, ReadWrite>, value: W::Value) {
        self.0.insert(field.encoding(), value.into());
    }
}

impl Recorded {
    fn flip<W: Width>(&mut self, field: Field<W, ReadWrite>, bits: u64) {
        let value: u64 = self.read(field).into();
        self.write(field, W::from_register(value ^ bits));
    }

    fn remove<W: Width>(&mut self, field: Field<W, ReadWrite>) {
        self.0.remove(&field.encoding());
    }

    fn segment(&mut self, register: usize, value: (u16, u64, u32, u32)) {
        let fields = GUEST_SEGMENTS[register];
        self.write(fields.selector, value.0);
        self.write(fields.base, value.1);
        self.write(fields.limit, value.2);
        self.write(fields.rights, value.3);
    }

    fn inject(&mut self, kind: EventKind, vector: u8) {
        self.write(ENTRY_INTERRUPTION_INFO, InterruptionInfo::inject(kind, vector, false).0);
    }
}

/// 39 and 48 bits, SYSCALL, NX and long mode; leaf 7 as given.
#[derive(Clone)]
pub(crate) struct Cpuid {
    ebx7: u32,
    ecx7: u32,
    eax7_1: u32,
}

pub(crate) const PLAIN: Cpuid = Cpuid { ebx7: 0, ecx7: 0, eax7_1: 0 };
/// SGX, RTM, bus-lock detection, LAM.
const RICH: Cpuid = Cpuid { ebx7: 1 << 2 | 1 << 11, ecx7: 1 << 24, eax7_1: 1 << 26 };

impl CpuIdReader for Cpuid {
    fn cpuid2(&self, leaf: u32, subleaf: u32) -> CpuIdResult {
        let (eax, ebx, ecx, edx) = match (leaf, subleaf) {
            (0, _) => (7, 0, 0, 0),
            (7, 0) => (1, self.ebx7, self.ecx7, 0),
            (7, 1) => (self.eax7_1, 0, 0, 0),
            (0x8000_0001, _) => (0, 0, 0, 1 << 11 | 1 << 20 | 1 << 29),
            (0x8000_0008, _) => (48 << 8 | 39, 0, 0, 0),
            _ => (0, 0, 0, 0),
        };
        CpuIdResult { eax, ebx, ecx, edx }
    }
}

/// All controls, the fixed bits of a common CPU (and NW and CD, which no check minds), all activity
/// states.
fn caps() -> Capabilities {
    let read = |number| {
        Ok::<_, ()>(match number {
            msr::BASIC => 1 << 55 | 6 << 50 | 0x12,
            msr::MISC => 7 << 6,
            msr::CR0_FIXED0 => CR0_PG | CR0_CD | CR0_NE | CR0_PE,
            msr::CR0_FIXED1 => 0xffff_ffff & !CR0_NW,
            msr::CR4_FIXED0 => CR4_VMXE,
            msr::CR4_FIXED1 => 0x00ff_ffff,
            _ => 0xffff_ffff_0000_0000,
        })
    };
    Capabilities::read(read).unwrap()
}

const UNRESTRICTED: u64 = Secondary::UNRESTRICTED_GUEST.bits() as u64;
const IA32E: u64 = Entry::IA32E_MODE_GUEST.bits() as u64;
const UNUSABLE: u32 = rights::UNUSABLE as u32;

// ---- Valid states ----------------------------------------------------------------------

pub(crate) const CR4: Cr4 = Cr4 { allowed: 0x7ff };

/// After RESET, as `setup` writes it.
pub(crate) fn reset() -> Recorded {
    let at = Pointers { io_bitmap: 0x1000, msr_bitmap: 0x3000, eptp: 0x401e, vpid: 1 };
    let mut vmcs = Recorded::default();
    initialize(&mut vmcs, &caps(), &at, &CR4);
    vmcs
}

/// After a start-up IPI.
fn started() -> Recorded {
    let mut vmcs = reset();
    startup(&mut vmcs, 0x9a);
    vmcs
}

/// The start of a VM.
fn flat() -> Recorded {
    let mut vmcs = reset();
    flat_protected(&mut vmcs, 0x0010_0000);
    vmcs
}

/// 32-bit paging, not unrestricted.
fn restricted() -> Recorded {
    let mut vmcs = flat();
    vmcs.flip(SECONDARY_CONTROLS, UNRESTRICTED);
    vmcs.flip(GUEST_CR0, CR0_PG);
    vmcs
}

fn pae() -> Recorded {
    let mut vmcs = flat();
    vmcs.flip(GUEST_CR0, CR0_PG);
    vmcs.flip(GUEST_CR4, CR4_PAE);
    vmcs.write(GUEST_CR3, 0x20);
    vmcs.write(GUEST_PDPTE0, 0x7f_ffff_fe19);
    vmcs.write(GUEST_PDPTE1, 0x2001);
    // Not present: the rest is ignored.
    vmcs.write(GUEST_PDPTE2, !1);
    vmcs.write(GUEST_PDPTE3, 0);
    vmcs
}

fn long() -> Recorded {
    let mut vmcs = flat();
    vmcs.flip(ENTRY_CONTROLS, IA32E);
    vmcs.flip(GUEST_CR0, CR0_PG);
    vmcs.flip(GUEST_CR4, CR4_PAE);
    vmcs.write(GUEST_CR3, 0x1000);
    vmcs.write(GUEST_IA32_EFER, EFER_LME | EFER_LMA | 1 << 11 | 1);
    vmcs.segment(CS, (0x08, 0, u32::MAX, 0xa09b));
    vmcs.segment(SS, (0, 0, 0, UNUSABLE));
    vmcs.write(GUEST_GDTR_LIMIT, 0xffff);
    vmcs.write(GUEST_IDTR_LIMIT, 0xffff);
    vmcs.write(GUEST_RIP, 0xffff_8000_0010_0000);
    vmcs.write(GUEST_FS_BASE, 0x7fff_ffff_ffff);
    vmcs.write(GUEST_GS_BASE, 0xffff_8000_0000_0000);
    vmcs
}

/// At CPL 3, in long mode.
fn user() -> Recorded {
    let mut vmcs = long();
    vmcs.segment(CS, (0x33, 0, u32::MAX, 0xa0fb));
    vmcs.segment(SS, (0x2b, 0, u32::MAX, 0xc0f3));
    vmcs.write(GUEST_RIP, 0x40_1000);
    vmcs
}

fn real() -> Recorded {
    let mut vmcs = flat();
    vmcs.flip(GUEST_CR0, CR0_PE);
    for &register in CODE_AND_DATA {
        // RPL means nothing there.
        vmcs.segment(register, (0x1230 + register as u16, 0x12300, 0xffff, 0x93));
    }
    vmcs.segment(CS, (0xf000, 0xffff_0000, 0xffff, 0x9b));
    vmcs.segment(LDTR, (0, 0, 0xffff, 0x82));
    vmcs.segment(TR, (0, 0, 0xffff, 0x83));
    vmcs.write(GUEST_RIP, 0xfff0);
    vmcs
}

fn vm86() -> Recorded {
    let mut vmcs = flat();
    vmcs.flip(GUEST_RFLAGS, RFLAGS_VM);
    for &register in CODE_AND_DATA {
        vmcs.segment(register, (0x1237, 0x12370, 0xffff, 0xf3));
    }
    vmcs
}

pub(crate) type State = fn() -> Recorded;
type Change = fn(&mut Recorded);
pub(crate) const STATES: [(&str, State); 9] = [
    ("reset", reset),
    ("started", started),
    ("flat", flat),
    ("restricted", restricted),
    ("pae", pae),
    ("long", long),
    ("user", user),
    ("real", real),
    ("vm86", vm86),
];

// ---- Running the checks ----------------------------------------------------------------

/// The fields of each violation, and its rule.
pub(crate) fn violations(vmcs: &Recorded, cpuid: &Cpuid) -> Vec<(Vec<&'static str>, &'static str)> {
    let mut found = Vec::new();
    check(vmcs, &caps(), &Processor::read(cpuid), |violation| {
        let names = violation.fields.iter().map(|field| field.name).collect();
        found.push((names, violation.rule));
    });
    found
}

#[test]
fn valid_states_pass() {
    for (name, state) in STATES {
        for cpuid in [PLAIN, RICH] {
            assert_eq!(violations(&state(), &cpuid), [], "{name}");
        }
    }
}

/// Changes that only look wrong.
#[test]
fn valid_oddities_pass() {
    let cases: [(&str, State, Change); 29] = [
        ("NW and CD are not looked at", flat, |v| v.flip(GUEST_CR0, CR0_NW)),
        ("PCIDE in IA-32e mode", long, |v| v.flip(GUEST_CR4, CR4_PCIDE)),
        ("CET with WP", flat, |v| {
            v.flip(GUEST_CR0, CR0_WP);
            v.flip(GUEST_CR4, CR4_CET);
        }),
        ("CR3 up to MAXPHYADDR", long, |v| v.write(GUEST_CR3, (1 << 39) - 1)),
        ("debug controls that are not loaded", flat, |v| {
            v.flip(ENTRY_CONTROLS, Entry::LOAD_DEBUG_CONTROLS.bits().into());
            v.write(GUEST_DR7, u64::MAX);
            v.write(GUEST_IA32_DEBUGCTL, u64::MAX);
        }),
        ("debug controls of some CPUs", flat, |v| v.write(GUEST_IA32_DEBUGCTL, 0x7fc3)),
        ("PAT and EFER that do not exist", flat, |v| {
            v.flip(ENTRY_CONTROLS, Entry::LOAD_PAT.union(Entry::LOAD_EFER).bits().into());
            v.remove(GUEST_IA32_PAT);
            v.remove(GUEST_IA32_EFER);
        }),
        ("secondary controls that do not exist", restricted, |v| {
            v.flip(PRIMARY_CONTROLS, Primary::ACTIVATE_SECONDARY.bits().into());
            v.remove(SECONDARY_CONTROLS);
        }),
        ("PDPTEs that paging does not use", flat, |v| v.flip(GUEST_CR4, CR4_PAE)),
        ("PDPTEs in memory, without EPT", pae, |v| {
            v.flip(SECONDARY_CONTROLS, Secondary::ENABLE_EPT.bits().into());
            v.write(GUEST_PDPTE1, u64::MAX);
        }),
        ("LME without LMA, unpaged", flat, |v| v.write(GUEST_IA32_EFER, EFER_LME)),
        ("RIP behind the lower half", long, |v| v.write(GUEST_RIP, 0x8000_0000_0000)),
        ("RPL is free in an unrestricted guest", flat, |v| {
            v.flip(GUEST_SS_SELECTOR, 3);
            v.flip(GUEST_DS_SELECTOR, 3);
        }),
        ("conforming code at its DPL", flat, |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0xc09f)),
        ("conforming code above its DPL", user, |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0xa09f)),
        ("an unusable register may hold anything", flat, |v| {
            for register in [ES, SS, DS, FS, GS, LDTR] {
                let base = if matches!(register, FS | GS) { 0 } else { u64::MAX >> 1 };
                // All bits but the DPL of SS.
                v.segment(register, (7, base, 0x0fff_0000, 0xffff_ff9f));
            }
        }),
        ("unusable code that cannot be read, with any RPL", restricted, |v| {
            DATA_BUT_SS.iter().for_each(|&register| v.segment(register, (3, 0, 0, UNUSABLE | 8)));
        }),
        ("CS may be marked unusable", flat, |v| {
            v.flip(GUEST_CS_ACCESS_RIGHTS, rights::UNUSABLE);
        }),
        ("type 3 in CS", real, |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0x93)),
        ("AVL, and L where it means nothing", flat, |v| {
            v.flip(GUEST_DS_ACCESS_RIGHTS, 3 << 12);
            v.flip(GUEST_CS_ACCESS_RIGHTS, 3 << 12);
        }),
        ("a limit that fits both", flat, |v| {
            v.write(GUEST_DS_LIMIT, 0xf_ffff);
            v.flip(GUEST_DS_ACCESS_RIGHTS, rights::G);
            v.write(GUEST_ES_LIMIT, 0xf_ffff);
        }),
        ("compatibility mode", user, |v| {
            v.write(GUEST_CS_ACCESS_RIGHTS, 0xc0fb);
            v.write(GUEST_RIP, 0xffff_ffff);
        }),
        ("an interrupt into HLT", flat, |v| {
            v.write(GUEST_ACTIVITY_STATE, HLT as u32);
            v.flip(GUEST_RFLAGS, RFLAGS_IF);
            v.inject(EventKind::External, 0x20);
        }),
        ("a machine check into shutdown", flat, |v| {
            v.write(GUEST_ACTIVITY_STATE, SHUTDOWN as u32);
            v.inject(EventKind::HardwareException, vector::MC);
        }),
        ("a debug exception into HLT", flat, |v| {
            v.write(GUEST_ACTIVITY_STATE, HLT as u32);
            v.inject(EventKind::HardwareException, vector::DB);
        }),
        ("a monitor trap pending in HLT", flat, |v| {
            v.write(GUEST_ACTIVITY_STATE, HLT as u32);
            v.inject(EventKind::Other, 0);
        }),
        ("NMI blocking that is not the guest's", flat, |v| {
            v.flip(PIN_BASED_CONTROLS, PinBased::VIRTUAL_NMIS.bits().into());
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_NMI);
            v.inject(EventKind::Nmi, vector::NMI);
        }),
        ("BS under blocking by MOV SS, stepping", flat, |v| {
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_MOV_SS as u32);
            v.flip(GUEST_RFLAGS, RFLAGS_TF);
            v.write(GUEST_PENDING_DEBUG, PENDING_DEBUG_BS);
            v.inject(EventKind::HardwareException, vector::DB);
        }),
        ("no BS under blocking by STI, stepping branches", flat, |v| {
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_STI as u32);
            v.flip(GUEST_RFLAGS, RFLAGS_TF | RFLAGS_IF);
            v.write(GUEST_IA32_DEBUGCTL, DEBUGCTL_BTF);
        }),
    ];
    for (name, state, change) in cases {
        let mut vmcs = state();
        change(&mut vmcs);
        assert_eq!(violations(&vmcs, &PLAIN), [], "{name}");
    }
}

#[test]
fn bits_that_a_feature_brings_pass_with_it() {
    let cases: [(State, Change, &str); 5] = [
        (flat, |v| v.write(GUEST_IA32_DEBUGCTL, 1 << 2 | 1 << 15), "GUEST_IA32_DEBUGCTL"),
        (flat, |v| v.write(GUEST_PENDING_DEBUG, 1 << 11), "GUEST_PENDING_DEBUG"),
        (flat, |v| v.write(GUEST_PENDING_DEBUG, 1 << 16 | 1 << 12), "GUEST_PENDING_DEBUG"),
        (flat, |v| v.write(GUEST_INTERRUPTIBILITY, 1 << 4), "GUEST_INTERRUPTIBILITY"),
        (long, |v| v.write(GUEST_CR3, 3 << 61 | 0x1000), "GUEST_CR3"),
    ];
    for (state, change, field) in cases {
        let mut vmcs = state();
        change(&mut vmcs);
        assert_eq!(violations(&vmcs, &RICH), [], "{field}");
        let found = violations(&vmcs, &PLAIN);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0[0], field);
    }
}

// ---- One broken rule each ----------------------------------------------------------------

/// A state, what is done to it, and the fields that each violation then names.
type Case = (State, Change, &'static str);

const REGISTERS_AND_MSRS: [Case; 26] = [
    (flat, |v| v.flip(GUEST_CR0, CR0_NE), "GUEST_CR0, IA32_VMX_CR0_FIXED0"),
    (restricted, |v| v.flip(GUEST_CR0, CR0_PG), "GUEST_CR0, IA32_VMX_CR0_FIXED0"),
    (flat, |v| v.flip(GUEST_CR0, 1 << 32), "GUEST_CR0, IA32_VMX_CR0_FIXED1"),
    (real, |v| v.flip(GUEST_CR0, CR0_PG), "GUEST_CR0"),
    (flat, |v| v.flip(GUEST_CR4, CR4_VMXE), "GUEST_CR4, IA32_VMX_CR4_FIXED0"),
    (flat, |v| v.flip(GUEST_CR4, 1 << 24), "GUEST_CR4, IA32_VMX_CR4_FIXED1"),
    (flat, |v| v.flip(GUEST_CR4, CR4_CET), "GUEST_CR4, GUEST_CR0"),
    (long, |v| v.flip(GUEST_CR0, CR0_PG), "GUEST_CR0, ENTRY_CONTROLS"),
    (long, |v| v.flip(GUEST_CR4, CR4_PAE), "GUEST_CR4, ENTRY_CONTROLS"),
    (flat, |v| v.flip(GUEST_CR4, CR4_PCIDE), "GUEST_CR4, ENTRY_CONTROLS"),
    (long, |v| v.flip(GUEST_CR3, 1 << 39), "GUEST_CR3, MAXPHYADDR"),
    (long, |v| v.flip(GUEST_CR3, 1 << 63), "GUEST_CR3, MAXPHYADDR"),
    (flat, |v| v.write(GUEST_IA32_DEBUGCTL, 1 << 3), "GUEST_IA32_DEBUGCTL"),
    (flat, |v| v.write(GUEST_IA32_DEBUGCTL, 1 << 16), "GUEST_IA32_DEBUGCTL"),
    (flat, |v| v.flip(GUEST_DR7, 1 << 32), "GUEST_DR7"),
    (flat, |v| v.write(GUEST_SYSENTER_ESP, 1 << 47), "GUEST_SYSENTER_ESP, linear-address width"),
    (flat, |v| v.write(GUEST_SYSENTER_EIP, 1 << 63), "GUEST_SYSENTER_EIP, linear-address width"),
    (flat, |v| v.write(GUEST_IA32_PAT, 0x0007_0406_0007_0402), "GUEST_IA32_PAT"),
    (flat, |v| v.write(GUEST_IA32_PAT, 0x0307_0406_0007_0406), "GUEST_IA32_PAT"),
    (flat, |v| v.write(GUEST_IA32_PAT, 0x0800_0000_0000_0000), "GUEST_IA32_PAT"),
    (flat, |v| v.write(GUEST_IA32_EFER, 1 << 1), "GUEST_IA32_EFER"),
    (flat, |v| v.write(GUEST_IA32_EFER, 1 << 12), "GUEST_IA32_EFER"),
    (flat, |v| v.write(GUEST_IA32_EFER, EFER_LMA), "GUEST_IA32_EFER, ENTRY_CONTROLS"),
    (long, |v| v.flip(GUEST_IA32_EFER, EFER_LMA | EFER_LME), "GUEST_IA32_EFER, ENTRY_CONTROLS"),
    (long, |v| v.flip(GUEST_IA32_EFER, EFER_LME), "GUEST_IA32_EFER, GUEST_CR0"),
    (restricted, |v| v.flip(GUEST_IA32_EFER, EFER_LME), "GUEST_IA32_EFER, GUEST_CR0"),
];

const SEGMENTS: [Case; 43] = [
    // Selectors.
    (restricted, |v| v.flip(GUEST_CS_SELECTOR, 3), "GUEST_SS_SELECTOR, GUEST_CS_SELECTOR"),
    (flat, |v| v.flip(GUEST_TR_SELECTOR, 4), "GUEST_TR_SELECTOR"),
    (real, |v| v.flip(GUEST_LDTR_SELECTOR, 4), "GUEST_LDTR_SELECTOR"),
    // Bases.
    (vm86, |v| v.flip(GUEST_CS_BASE, 1), "GUEST_CS_BASE, GUEST_CS_SELECTOR"),
    (vm86, |v| v.flip(GUEST_GS_SELECTOR, 1), "GUEST_GS_BASE, GUEST_GS_SELECTOR"),
    (vm86, |v| v.flip(GUEST_FS_BASE, 1 << 63), "GUEST_FS_BASE, GUEST_FS_SELECTOR"),
    (long, |v| v.write(GUEST_FS_BASE, 1 << 47), "GUEST_FS_BASE, linear-address width"),
    (flat, |v| v.write(GUEST_GS_BASE, 1 << 63), "GUEST_GS_BASE, linear-address width"),
    (flat, |v| v.segment(FS, (0, 1 << 48, 0, UNUSABLE)), "GUEST_FS_BASE, linear-address width"),
    (flat, |v| v.write(GUEST_TR_BASE, 1 << 50), "GUEST_TR_BASE, linear-address width"),
    (real, |v| v.write(GUEST_LDTR_BASE, 1 << 50), "GUEST_LDTR_BASE, linear-address width"),
    (flat, |v| v.write(GUEST_CS_BASE, 1 << 32), "GUEST_CS_BASE"),
    (flat, |v| v.write(GUEST_SS_BASE, 1 << 32), "GUEST_SS_BASE"),
    (long, |v| v.write(GUEST_DS_BASE, 1 << 63), "GUEST_DS_BASE"),
    (long, |v| v.write(GUEST_ES_BASE, 1 << 40), "GUEST_ES_BASE"),
    // Limits.
    (vm86, |v| v.write(GUEST_SS_LIMIT, 0xfffe), "GUEST_SS_LIMIT"),
    (vm86, |v| v.write(GUEST_ES_LIMIT, u32::MAX), "GUEST_ES_LIMIT"),
    // Access rights in virtual-8086 mode.
    (vm86, |v| v.write(GUEST_DS_ACCESS_RIGHTS, 0x93), "GUEST_DS_ACCESS_RIGHTS"),
    (vm86, |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0xfb), "GUEST_CS_ACCESS_RIGHTS"),
    (vm86, |v| v.flip(GUEST_GS_ACCESS_RIGHTS, rights::UNUSABLE), "GUEST_GS_ACCESS_RIGHTS"),
    // Types.
    (flat, |v| v.flip(GUEST_CS_ACCESS_RIGHTS, 1), "GUEST_CS_ACCESS_RIGHTS"),
    (flat, |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0xc097), "GUEST_CS_ACCESS_RIGHTS"),
    (restricted, |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0xc093), "GUEST_CS_ACCESS_RIGHTS"),
    (flat, |v| v.flip(GUEST_SS_ACCESS_RIGHTS, 1), "GUEST_SS_ACCESS_RIGHTS"),
    (flat, |v| v.write(GUEST_SS_ACCESS_RIGHTS, 0xc09b), "GUEST_SS_ACCESS_RIGHTS"),
    (flat, |v| v.flip(GUEST_DS_ACCESS_RIGHTS, 1), "GUEST_DS_ACCESS_RIGHTS"),
    (flat, |v| v.write(GUEST_ES_ACCESS_RIGHTS, 0xc099), "GUEST_ES_ACCESS_RIGHTS"),
    (flat, |v| v.write(GUEST_TR_ACCESS_RIGHTS, 0x89), "GUEST_TR_ACCESS_RIGHTS"),
    (long, |v| v.write(GUEST_TR_ACCESS_RIGHTS, 0x83), "GUEST_TR_ACCESS_RIGHTS"),
    (real, |v| v.write(GUEST_LDTR_ACCESS_RIGHTS, 0x8b), "GUEST_LDTR_ACCESS_RIGHTS"),
    (vm86, |v| v.flip(GUEST_TR_ACCESS_RIGHTS, rights::UNUSABLE), "GUEST_TR_ACCESS_RIGHTS"),
    // DPL.
    (real, |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0xf3), "GUEST_CS_ACCESS_RIGHTS"),
    (
        flat,
        |v| v.flip(GUEST_CS_ACCESS_RIGHTS, 3 << 5),
        "GUEST_CS_ACCESS_RIGHTS, GUEST_SS_ACCESS_RIGHTS",
    ),
    (
        user,
        |v| v.write(GUEST_SS_ACCESS_RIGHTS, 0xc093),
        "GUEST_CS_ACCESS_RIGHTS, GUEST_SS_ACCESS_RIGHTS",
    ),
    (
        flat,
        |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0xc0ff),
        "GUEST_CS_ACCESS_RIGHTS, GUEST_SS_ACCESS_RIGHTS",
    ),
    (
        restricted,
        |v| v.write(GUEST_CS_ACCESS_RIGHTS, 0xc0bf),
        "GUEST_CS_ACCESS_RIGHTS, GUEST_SS_ACCESS_RIGHTS",
    ),
    // An unusable SS has its DPL all the same.
    (
        restricted,
        |v| {
            v.write(GUEST_CS_ACCESS_RIGHTS, 0xc09f);
            v.write(GUEST_SS_ACCESS_RIGHTS, UNUSABLE | 1 << 5);
        },
        "GUEST_SS_ACCESS_RIGHTS, GUEST_SS_SELECTOR",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_CS_ACCESS_RIGHTS, 0xc093);
            v.flip(GUEST_SS_ACCESS_RIGHTS, 3 << 5);
        },
        "GUEST_SS_ACCESS_RIGHTS, GUEST_CS_ACCESS_RIGHTS",
    ),
    (
        real,
        |v| {
            v.write(GUEST_CS_ACCESS_RIGHTS, 0x9f);
            v.flip(GUEST_SS_ACCESS_RIGHTS, 3 << 5);
        },
        "GUEST_SS_ACCESS_RIGHTS, GUEST_CR0",
    ),
    (restricted, |v| v.flip(GUEST_DS_SELECTOR, 1), "GUEST_DS_ACCESS_RIGHTS, GUEST_DS_SELECTOR"),
    (
        restricted,
        |v| v.segment(GS, (0x0a, 0, u32::MAX, 0xc0bb)),
        "GUEST_GS_ACCESS_RIGHTS, GUEST_GS_SELECTOR",
    ),
    // D/B with L.
    (long, |v| v.flip(GUEST_CS_ACCESS_RIGHTS, rights::DB), "GUEST_CS_ACCESS_RIGHTS"),
    (
        real,
        |v| v.write(GUEST_LDTR_LIMIT, 0xf_ffff + 1),
        "GUEST_LDTR_ACCESS_RIGHTS, GUEST_LDTR_LIMIT",
    ),
];

const REST: [Case; 41] = [
    // GDTR and IDTR.
    (flat, |v| v.write(GUEST_GDTR_BASE, 1 << 48), "GUEST_GDTR_BASE, linear-address width"),
    (flat, |v| v.write(GUEST_IDTR_BASE, 1 << 63), "GUEST_IDTR_BASE, linear-address width"),
    (flat, |v| v.write(GUEST_GDTR_LIMIT, 0x1_0000), "GUEST_GDTR_LIMIT"),
    (flat, |v| v.write(GUEST_IDTR_LIMIT, u32::MAX), "GUEST_IDTR_LIMIT"),
    // RIP and RFLAGS.
    (flat, |v| v.write(GUEST_RIP, 1 << 32), "GUEST_RIP, ENTRY_CONTROLS, GUEST_CS_ACCESS_RIGHTS"),
    (
        long,
        |v| v.flip(GUEST_CS_ACCESS_RIGHTS, rights::L),
        "GUEST_RIP, ENTRY_CONTROLS, GUEST_CS_ACCESS_RIGHTS",
    ),
    (long, |v| v.write(GUEST_RIP, 1 << 48), "GUEST_RIP, linear-address width"),
    (long, |v| v.write(GUEST_RIP, 1 << 63), "GUEST_RIP, linear-address width"),
    (flat, |v| v.flip(GUEST_RFLAGS, RFLAGS_FIXED), "GUEST_RFLAGS"),
    (flat, |v| v.flip(GUEST_RFLAGS, 1 << 3), "GUEST_RFLAGS"),
    (flat, |v| v.flip(GUEST_RFLAGS, 1 << 5), "GUEST_RFLAGS"),
    (flat, |v| v.flip(GUEST_RFLAGS, 1 << 15), "GUEST_RFLAGS"),
    (flat, |v| v.flip(GUEST_RFLAGS, 1 << 22), "GUEST_RFLAGS"),
    (flat, |v| v.flip(GUEST_RFLAGS, 1 << 63), "GUEST_RFLAGS"),
    (vm86, |v| v.flip(GUEST_CR0, CR0_PE), "GUEST_RFLAGS, GUEST_CR0"),
    (
        vm86,
        |v| {
            v.flip(ENTRY_CONTROLS, IA32E);
            v.flip(GUEST_CR0, CR0_PG);
            v.flip(GUEST_CR4, CR4_PAE);
            v.flip(GUEST_IA32_EFER, EFER_LMA | EFER_LME);
        },
        "GUEST_RFLAGS, ENTRY_CONTROLS",
    ),
    (flat, |v| v.inject(EventKind::External, 0x20), "GUEST_RFLAGS, ENTRY_INTERRUPTION_INFO"),
    // Activity state.
    (flat, |v| v.write(GUEST_ACTIVITY_STATE, 4), "GUEST_ACTIVITY_STATE"),
    (flat, |v| v.write(GUEST_ACTIVITY_STATE, u32::MAX), "GUEST_ACTIVITY_STATE"),
    (
        user,
        |v| v.write(GUEST_ACTIVITY_STATE, HLT as u32),
        "GUEST_ACTIVITY_STATE, GUEST_SS_ACCESS_RIGHTS",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_ACTIVITY_STATE, SHUTDOWN as u32);
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_MOV_SS as u32);
        },
        "GUEST_ACTIVITY_STATE, GUEST_INTERRUPTIBILITY",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_ACTIVITY_STATE, HLT as u32);
            v.inject(EventKind::HardwareException, vector::GP);
        },
        "GUEST_ACTIVITY_STATE, ENTRY_INTERRUPTION_INFO",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_ACTIVITY_STATE, HLT as u32);
            v.inject(EventKind::Other, 1);
        },
        "GUEST_ACTIVITY_STATE, ENTRY_INTERRUPTION_INFO",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_ACTIVITY_STATE, SHUTDOWN as u32);
            v.inject(EventKind::HardwareException, vector::DB);
        },
        "GUEST_ACTIVITY_STATE, ENTRY_INTERRUPTION_INFO",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_ACTIVITY_STATE, WAIT_FOR_SIPI as u32);
            v.inject(EventKind::Nmi, vector::NMI);
        },
        "GUEST_ACTIVITY_STATE, ENTRY_INTERRUPTION_INFO",
    ),
    // Interruptibility state.
    (flat, |v| v.write(GUEST_INTERRUPTIBILITY, 1 << 5), "GUEST_INTERRUPTIBILITY"),
    (flat, |v| v.write(GUEST_INTERRUPTIBILITY, 1 << 31), "GUEST_INTERRUPTIBILITY"),
    (
        flat,
        |v| {
            v.write(GUEST_INTERRUPTIBILITY, 3);
            v.flip(GUEST_RFLAGS, RFLAGS_IF);
        },
        "GUEST_INTERRUPTIBILITY",
    ),
    (
        flat,
        |v| v.write(GUEST_INTERRUPTIBILITY, BLOCKING_STI as u32),
        "GUEST_INTERRUPTIBILITY, GUEST_RFLAGS",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_STI as u32);
            v.flip(GUEST_RFLAGS, RFLAGS_IF);
            v.inject(EventKind::External, 0x20);
        },
        "GUEST_INTERRUPTIBILITY, ENTRY_INTERRUPTION_INFO",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_MOV_SS as u32);
            v.inject(EventKind::Nmi, vector::NMI);
        },
        "GUEST_INTERRUPTIBILITY, ENTRY_INTERRUPTION_INFO",
    ),
    (
        flat,
        |v| {
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_NMI);
            v.inject(EventKind::Nmi, vector::NMI);
        },
        "GUEST_INTERRUPTIBILITY, ENTRY_INTERRUPTION_INFO, PIN_BASED_CONTROLS",
    ),
    (flat, |v| v.write(GUEST_INTERRUPTIBILITY, BLOCKING_SMI as u32), "GUEST_INTERRUPTIBILITY"),
    // Pending debug exceptions.
    (flat, |v| v.write(GUEST_PENDING_DEBUG, 1 << 4), "GUEST_PENDING_DEBUG"),
    (flat, |v| v.write(GUEST_PENDING_DEBUG, 1 << 13), "GUEST_PENDING_DEBUG"),
    (flat, |v| v.write(GUEST_PENDING_DEBUG, 1 << 63), "GUEST_PENDING_DEBUG"),
    // VMCS link pointer.
    (flat, |v| v.write(VMCS_LINK_POINTER, 0x1001), "VMCS_LINK_POINTER"),
    (flat, |v| v.write(VMCS_LINK_POINTER, 1 << 39), "VMCS_LINK_POINTER"),
    // PDPTEs.
    (pae, |v| v.flip(GUEST_PDPTE1, 1 << 1), "GUEST_PDPTE1"),
    (pae, |v| v.flip(GUEST_PDPTE0, 1 << 8), "GUEST_PDPTE0"),
    (pae, |v| v.write(GUEST_PDPTE3, 1 << 39 | 1), "GUEST_PDPTE3"),
];

/// BS: the state that forbids it or asks for it.
const BS: &str = "GUEST_PENDING_DEBUG, GUEST_RFLAGS, GUEST_IA32_DEBUGCTL, \
                  GUEST_INTERRUPTIBILITY, GUEST_ACTIVITY_STATE";

const STEPPING: [Case; 4] = [
    (
        flat,
        |v| {
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_MOV_SS as u32);
            v.flip(GUEST_RFLAGS, RFLAGS_TF);
        },
        BS,
    ),
    (
        flat,
        |v| {
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_STI as u32);
            v.flip(GUEST_RFLAGS, RFLAGS_IF);
            v.write(GUEST_PENDING_DEBUG, PENDING_DEBUG_BS);
        },
        BS,
    ),
    (
        flat,
        |v| {
            v.write(GUEST_INTERRUPTIBILITY, BLOCKING_MOV_SS as u32);
            v.flip(GUEST_RFLAGS, RFLAGS_TF);
            v.write(GUEST_IA32_DEBUGCTL, DEBUGCTL_BTF);
            v.write(GUEST_PENDING_DEBUG, PENDING_DEBUG_BS);
        },
        BS,
    ),
    (
        flat,
        |v| {
            v.write(GUEST_ACTIVITY_STATE, HLT as u32);
            v.flip(GUEST_RFLAGS, RFLAGS_TF);
        },
        BS,
    ),
];

#[test]
fn each_broken_rule_is_named() {
    let cases = [&REGISTERS_AND_MSRS[..], &SEGMENTS, &REST, &STEPPING].concat();
    for (index, (state, change, expected)) in cases.into_iter().enumerate() {
        let mut vmcs = state();
        assert_eq!(violations(&vmcs, &PLAIN), [], "case {index} before the change");
        change(&mut vmcs);
        let found = violations(&vmcs, &PLAIN);
        assert_eq!(found.len(), 1, "case {index}: {found:?}");
        assert_eq!(found[0].0.join(", "), expected, "case {index}: {found:?}");
    }
}

#[test]
fn rtm_allows_nothing_else() {
    let mut vmcs = flat();
    vmcs.write(GUEST_PENDING_DEBUG, PENDING_DEBUG_RTM);
    assert_eq!(violations(&vmcs, &RICH)[0].0, ["GUEST_PENDING_DEBUG"]);
    vmcs.write(GUEST_PENDING_DEBUG, PENDING_DEBUG_RTM | PENDING_DEBUG_ENABLED | 1);
    assert_eq!(violations(&vmcs, &RICH)[0].0, ["GUEST_PENDING_DEBUG"]);
    vmcs.write(GUEST_PENDING_DEBUG, PENDING_DEBUG_RTM | PENDING_DEBUG_ENABLED);
    vmcs.write(GUEST_INTERRUPTIBILITY, BLOCKING_MOV_SS as u32);
    let found = violations(&vmcs, &RICH);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, ["GUEST_PENDING_DEBUG", "GUEST_INTERRUPTIBILITY"]);
}

#[test]
fn an_enclave_is_not_interrupted_behind_mov_ss() {
    let mut vmcs = flat();
    vmcs.write(GUEST_INTERRUPTIBILITY, (ENCLAVE_INTERRUPTION | BLOCKING_MOV_SS) as u32);
    let found = violations(&vmcs, &RICH);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, ["GUEST_INTERRUPTIBILITY"]);
}

/// Rules that all segment registers share, register by register, and then: every row of the
/// tables has been broken by some test.
#[test]
fn every_segment_rule_can_be_broken() {
    let mut broken = BTreeSet::new();
    for (register, fields) in GUEST_SEGMENTS.into_iter().enumerate() {
        let state = || {
            let mut vmcs = flat();
            if register == LDTR {
                vmcs.segment(LDTR, (0, 0, u32::MAX, 0x8082));
            } else if register == TR {
                vmcs.segment(TR, (0x18, 0, u32::MAX, 0x808b));
            }
            vmcs
        };
        let rights = fields.rights.name();
        let limit = fields.limit.name();
        let mut expect = |change: &dyn Fn(&mut Recorded), expected: &[&str]| {
            let mut vmcs = state();
            assert_eq!(violations(&vmcs, &PLAIN), []);
            change(&mut vmcs);
            let found = violations(&vmcs, &PLAIN);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].0, expected);
            broken.insert(found[0].1);
            // And an unusable register is excused, but for CS and TR.
            vmcs.flip(fields.rights, rights::UNUSABLE);
            let excused = violations(&vmcs, &PLAIN).is_empty();
            assert_eq!(excused, !matches!(register, CS | TR), "{expected:?}");
        };
        for bit in (8..12).chain(17..32) {
            expect(&|v| v.flip(fields.rights, 1 << bit), &[rights]);
        }
        expect(&|v| v.flip(fields.rights, rights::S), &[rights]);
        expect(&|v| v.flip(fields.rights, rights::P), &[rights]);
        expect(&|v| v.flip(fields.rights, rights::G), &[rights, limit]);
        for bit in [0, 11] {
            expect(&|v| v.flip(fields.limit, 1 << bit), &[rights, limit]);
        }
    }
    for (state, change, _) in SEGMENTS {
        let mut vmcs = state();
        change(&mut vmcs);
        broken.extend(violations(&vmcs, &PLAIN).iter().map(|violation| violation.1));
    }
    for row in VIRTUAL_8086.iter().chain(&NOT_VIRTUAL_8086).chain(&SYSTEM) {
        assert!(broken.contains(row.rule), "{}", row.rule);
    }
}

#[test]
fn unsupported_activity_states_are_named() {
    for state in [HLT, SHUTDOWN, WAIT_FOR_SIPI] {
        let mut vmcs = flat();
        vmcs.write(GUEST_ACTIVITY_STATE, state as u32);
        assert_eq!(violations(&vmcs, &PLAIN), []);
        let caps = Capabilities { misc: !(1 << (5 + state)), ..caps() };
        let mut count = 0;
        check(&vmcs, &caps, &Processor::read(&PLAIN), |violation| {
            assert_eq!(violation.fields[0].name, "GUEST_ACTIVITY_STATE");
            count += 1;
        });
        assert_eq!(count, 1);
    }
}

#[test]
fn vmx_structures_may_be_limited_to_4_gib() {
    let mut vmcs = flat();
    vmcs.write(VMCS_LINK_POINTER, 1 << 32);
    assert_eq!(violations(&vmcs, &PLAIN), []);
    let caps = Capabilities { basic: 1 << 48, ..caps() };
    let mut names = Vec::new();
    check(&vmcs, &caps, &Processor::read(&PLAIN), |it| names.push(it.fields[0].name));
    assert_eq!(names, ["VMCS_LINK_POINTER"]);
}

#[test]
fn addresses_may_be_of_any_width() {
    for width in 0..=255 {
        let cpu = Processor { physical_bits: width, linear_bits: width, ..Processor::read(&PLAIN) };
        let mut vmcs = long();
        vmcs.write(GUEST_CR3, 1 << 62);
        vmcs.write(GUEST_FS_BASE, 1 << 62);
        vmcs.write(GUEST_RIP, 1 << 62);
        let mut names = Vec::new();
        check(&vmcs, &caps(), &cpu, |violation| names.push(violation.fields[0].name));
        assert_eq!(names.contains(&"GUEST_CR3"), width <= 62, "{width}");
        assert_eq!(names.contains(&"GUEST_FS_BASE"), width <= 63, "{width}");
        assert_eq!(names.contains(&"GUEST_RIP"), width <= 62, "{width}");
    }
}

fn diagnosis(vmcs: &Recorded) -> Vec<String> {
    let mut lines = Vec::new();
    diagnose(vmcs, &caps(), &Processor::read(&PLAIN), |it| lines.push(it.to_string()));
    lines
}

#[test]
fn findings_are_in_words() {
    let mut vmcs = restricted();
    vmcs.flip(GUEST_DR7, 1 << 32);
    vmcs.flip(GUEST_CS_SELECTOR, 3);
    assert_eq!(
        diagnosis(&vmcs),
        [
            "GUEST_DR7 = 0x100000400: bits 63:32 must be 0 (SDM volume 3, section \"Checks on \
             Guest Control Registers, Debug Registers, and MSRs\")",
            "GUEST_SS_SELECTOR = 0x10, GUEST_CS_SELECTOR = 0xb: RPL must be that of CS, the \
             guest not being unrestricted (SDM volume 3, section \"Checks on Guest Segment \
             Registers\")",
        ]
    );
}

#[test]
fn nothing_found_is_said_too() {
    let mut vmcs = flat();
    vmcs.0.insert(EXIT_QUALIFICATION.encoding(), 4);
    let lines = diagnosis(&vmcs);
    assert_eq!(lines.len(), 1);
    assert!(lines[0].contains("no rule"), "{lines:?}");
    assert!(lines[0].contains("4: the VMCS link pointer"), "{lines:?}");
}

// ---- Any state ---------------------------------------------------------------------------

/// A VMCS in which every field exists, and that remembers what it was asked.
struct Any {
    written: Recorded,
    elsewhere: u64,
    reads: RefCell<BTreeMap<&'static str, u64>>,
}

impl VmcsRead for Any {
    fn read<W: Width, A: Access>(&self, field: Field<W, A>) -> W::Value {
        let at = field.encoding();
        let value = self.written.0.get(&at).copied();
        let value = W::from_register(value.unwrap_or(self.elsewhere.rotate_left(at)));
        self.reads.borrow_mut().insert(field.name(), value.into());
        value
    }
}

/// Any answer to any leaf.
#[derive(Clone)]
struct AnyCpuid(CpuIdResult);
impl CpuIdReader for AnyCpuid {
    fn cpuid2(&self, _: u32, _: u32) -> CpuIdResult {
        self.0
    }
}

fn value() -> impl Strategy<Value = u64> {
    let bit = (0..64u32).prop_map(|bit| 1 << bit);
    prop_oneof![Just(0), Just(u64::MAX), bit.clone(), bit.prop_map(|bit: u64| !bit), any::<u64>()]
}

proptest! {
    /// No state, no CPU makes the checks panic; what they report is what the VMCS holds, and
    /// nothing is reported twice.
    #[test]
    fn any_state_is_diagnosed(
        base in 0..STATES.len() + 1,
        // Encodings of guest-state fields and of controls, widths 0 to 3.
        writes in prop::collection::vec((0..4u32, 0..0x18u32, any::<bool>(), value()), 0..40),
        elsewhere in value(),
        [eax, ebx, ecx, edx] in any::<[u32; 4]>(),
        msrs in any::<[u64; 6]>(),
    ) {
        let mut written = STATES.get(base).map_or_else(Recorded::default, |state| state.1());
        for (width, index, guest, value) in writes {
            let kind = if guest { 2 } else { 0 };
            written.0.insert(width << 13 | kind << 10 | index << 1, value);
        }
        let vmcs = Any { written, elsewhere, reads: RefCell::default() };
        let [basic, misc, cr0_fixed0, cr0_fixed1, cr4_fixed0, cr4_fixed1] = msrs;
        let caps = Capabilities {
            basic, misc, cr0_fixed0, cr0_fixed1, cr4_fixed0, cr4_fixed1, ..caps()
        };
        let cpu = Processor::read(&AnyCpuid(CpuIdResult { eax, ebx, ecx, edx }));
        let mut lines = Vec::new();
        diagnose(&vmcs, &caps, &cpu, |finding| {
            if let Finding::Broken(violation) = finding {
                let reads = vmcs.reads.borrow();
                assert!(reads.contains_key(violation.fields[0].name));
                for field in violation.fields {
                    // The rest is the CPU's.
                    assert!(reads.get(field.name).is_none_or(|value| *value == field.value));
                }
            }
            lines.push(finding.to_string());
        });
        prop_assert!(!lines.is_empty());
        let distinct: BTreeSet<_> = lines.iter().collect();
        prop_assert_eq!(distinct.len(), lines.len());
    }
}
