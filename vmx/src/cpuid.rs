//! CPUID as guests see it: computed once per VM, looked up at each exit.
//!
//! What the CPU says is filtered by a table of feature bits that the hypervisor can stand behind;
//! everything else reads as zero. Leaves: SDM volume 2, "CPUID—CPU Identification".

use raw_cpuid::{CpuIdReader, CpuIdResult};

use crate::xstate::{self, XState};

/// The hypervisor's signature in leaf 0x40000000: EBX, ECX, EDX.
pub const SIGNATURE: [u8; 12] = *b"UnsplitHV\0\0\0";

const ZERO: CpuIdResult = CpuIdResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
/// The highest basic leaf that guests see.
const MAX_BASIC: u32 = 0x16;
/// The highest extended leaf that guests see.
const MAX_EXTENDED: u32 = 0x8000_0008;
/// Leaves with subleaves, and how many of those are kept.
const SUBLEAVES: usize = 8;

/// One row of the filter: which bits of which leaf pass.
struct Filter {
    leaf: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

const ALL: u32 = u32::MAX;

/// Bits of several positions.
const fn bits(positions: &[u32]) -> u32 {
    let mut value = 0;
    let mut index = 0;
    while index < positions.len() {
        value |= 1 << positions[index];
        index += 1;
    }
    value
}

/// The filter. Leaf 7 is meant with subleaf 0.
const FILTERS: [Filter; 12] = [
    Filter {
        leaf: 1,
        eax: ALL,
        // CLFLUSH line size; the initial APIC ID and the count are 0: one vCPU.
        ebx: 0x0000_ff00,
        // SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE,
        // AVX, F16C, RDRAND.
        ecx: bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]),
        // FPU, VME, DE, PSE, TSC, MSR, PAE, CX8, SEP, PGE, CMOV, PAT, PSE-36, CLFSH, MMX, FXSR,
        // SSE, SSE2, SS.
        edx: bits(&[0, 1, 2, 3, 4, 5, 6, 8, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26, 27]),
    },
    Filter { leaf: 2, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL },
    Filter {
        leaf: 7,
        eax: 0,
        // FSGSBASE, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, AVX512F, AVX512DQ, RDSEED, ADX, SMAP,
        // AVX512_IFMA, CLFLUSHOPT, AVX512CD, SHA, AVX512BW, AVX512VL.
        ebx: bits(&[0, 3, 5, 7, 8, 9, 10, 16, 17, 18, 19, 20, 21, 23, 28, 29, 30, 31]),
        // AVX512_VBMI, UMIP, AVX512_VBMI2, GFNI, VAES, VPCLMULQDQ, AVX512_VNNI, AVX512_BITALG,
        // AVX512_VPOPCNTDQ.
        ecx: bits(&[1, 2, 6, 8, 9, 10, 11, 12, 14]),
        // Fast short REP MOV.
        edx: bits(&[4]),
    },
    Filter { leaf: 0x15, eax: ALL, ebx: ALL, ecx: ALL, edx: 0 },
    Filter { leaf: 0x16, eax: ALL, ebx: ALL, ecx: ALL, edx: 0 },
    Filter {
        leaf: 0x8000_0001,
        eax: 0,
        ebx: 0,
        // LAHF64, LZCNT, PREFETCHW.
        ecx: bits(&[0, 5, 8]),
        // SYSCALL, NX, 1-GiB pages, RDTSCP, long mode.
        edx: bits(&[11, 20, 26, 27, 29]),
    },
    Filter { leaf: 0x8000_0002, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL },
    Filter { leaf: 0x8000_0003, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL },
    Filter { leaf: 0x8000_0004, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL },
    Filter { leaf: 0x8000_0006, eax: 0, ebx: 0, ecx: ALL, edx: 0 },
    // Invariant TSC.
    Filter { leaf: 0x8000_0007, eax: 0, ebx: 0, ecx: 0, edx: 1 << 8 },
    Filter { leaf: 0x8000_0008, eax: 0xffff, ebx: 0, ecx: 0, edx: 0 },
];

/// Features that go when something they depend on is not there: (leaf, bits of EBX, ECX, EDX).
type Dependents = [(u32, u32, u32, u32)];
/// What needs XSAVE: XSAVE itself.
const NEED_XSAVE: &Dependents = &[(1, 0, 1 << 26, 0)];
/// What needs the AVX component: FMA, AVX, F16C, AVX2, VAES, VPCLMULQDQ.
const NEED_AVX: &Dependents = &[(1, 0, bits(&[12, 28, 29]), 0), (7, bits(&[5]), bits(&[9, 10]), 0)];
/// What needs the AVX-512 components.
const NEED_AVX512: &Dependents =
    &[(7, bits(&[16, 17, 21, 28, 30, 31]), bits(&[1, 6, 11, 12, 14]), 0)];
/// What needs the control "enable RDTSCP".
const NEED_RDTSCP: &Dependents = &[(0x8000_0001, 0, 0, 1 << 27)];
/// What needs the control "enable INVPCID".
const NEED_INVPCID: &Dependents = &[(1, 0, 1 << 17, 0), (7, 1 << 10, 0, 0)];

/// What a guest's CPUID depends on besides the CPU's.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    /// Tell the guest that IA32_CORE_CAPABILITIES exists.
    pub sld_exposed: bool,
    /// VMX can enable RDTSCP.
    pub rdtscp: bool,
    /// VMX can enable INVPCID.
    pub invpcid: bool,
}

/// Leaf 1, ECX: CR4.OSXSAVE is set.
pub const OSXSAVE: u32 = 1 << 27;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 7, EDX: IA32_CORE_CAPABILITIES exists.
const CORE_CAPABILITIES: u32 = 1 << 30;

/// The answers for one VM.
#[derive(Debug, Clone)]
pub struct CpuidTable {
    basic: [CpuIdResult; MAX_BASIC as usize + 1],
    /// Cache parameters (leaf 4), by subleaf.
    cache: [CpuIdResult; SUBLEAVES],
    extended: [CpuIdResult; (MAX_EXTENDED & 0xff) as usize + 1],
    hypervisor: CpuIdResult,
    xstate: XState,
}

impl CpuidTable {
    /// Asks the CPU and filters.
    pub fn new(cpu: &impl CpuIdReader, offer: Offer) -> Self {
        let mut table = Self {
            basic: [ZERO; MAX_BASIC as usize + 1],
            cache: [ZERO; SUBLEAVES],
            extended: [ZERO; (MAX_EXTENDED & 0xff) as usize + 1],
            hypervisor: ZERO,
            xstate: XState::read(cpu),
        };
        let vendor = cpu.cpuid2(0, 0);
        let extended = cpu.cpuid2(0x8000_0000, 0);
        let max_basic = vendor.eax.min(MAX_BASIC);
        let max_extended = extended.eax.clamp(0x8000_0000, MAX_EXTENDED);
        table.basic[0] = CpuIdResult { eax: max_basic, ..vendor };
        table.extended[0] = CpuIdResult { eax: max_extended, ..ZERO };
        for filter in &FILTERS {
            let (rows, max) = if filter.leaf >> 31 == 0 {
                (&mut table.basic[..], max_basic)
            } else {
                (&mut table.extended[..], max_extended)
            };
            if filter.leaf > max {
                continue;
            }
            let raw = cpu.cpuid2(filter.leaf, 0);
            rows[filter.leaf as usize & 0xff] = CpuIdResult {
                eax: raw.eax & filter.eax,
                ebx: raw.ebx & filter.ebx,
                ecx: raw.ecx & filter.ecx,
                edx: raw.edx & filter.edx,
            };
        }
        if max_basic >= 4 {
            for (subleaf, row) in table.cache.iter_mut().enumerate() {
                let raw = cpu.cpuid2(4, subleaf as u32);
                if raw.eax & 0x1f == 0 {
                    break;
                }
                // EAX bits 31:14: how many CPUs share the cache and the package. One does.
                *row = CpuIdResult { eax: raw.eax & 0x3fff, ..raw };
            }
        }
        table.basic[1].ecx |= HYPERVISOR;
        let xmask = table.xstate.mask;
        for (there, dependents) in [
            (xmask != 0, NEED_XSAVE),
            (xmask & xstate::AVX != 0, NEED_AVX),
            (xmask & xstate::AVX512 != 0, NEED_AVX512),
            (offer.rdtscp, NEED_RDTSCP),
            (offer.invpcid, NEED_INVPCID),
        ] {
            if !there {
                dependents.iter().for_each(|row| table.remove(*row));
            }
        }
        if offer.sld_exposed {
            table.basic[7].edx |= CORE_CAPABILITIES;
        }
        let word = |at: usize| {
            u32::from_le_bytes([
                SIGNATURE[at],
                SIGNATURE[at + 1],
                SIGNATURE[at + 2],
                SIGNATURE[at + 3],
            ])
        };
        table.hypervisor =
            CpuIdResult { eax: 0x4000_0000, ebx: word(0), ecx: word(4), edx: word(8) };
        table
    }

    fn remove(&mut self, (leaf, ebx, ecx, edx): (u32, u32, u32, u32)) {
        let rows = if leaf >> 31 == 0 { &mut self.basic[..] } else { &mut self.extended[..] };
        let row = &mut rows[leaf as usize & 0xff];
        row.ebx &= !ebx;
        row.ecx &= !ecx;
        row.edx &= !edx;
    }

    /// The extended state that the guest may use.
    pub const fn xstate(&self) -> &XState {
        &self.xstate
    }

    /// Leaf 0xd for a guest with this XCR0.
    pub fn extended_state(&self, subleaf: u32, xcr0: u64) -> CpuIdResult {
        let XState { mask, components, instructions } = self.xstate;
        match subleaf {
            _ if mask == 0 => ZERO,
            0 => CpuIdResult {
                eax: mask as u32,
                ebx: self.xstate.area_bytes(xcr0),
                ecx: self.xstate.area_bytes(mask),
                edx: (mask >> 32) as u32,
            },
            // Compacted format: as large as the standard one at most.
            1 => CpuIdResult { eax: instructions, ebx: self.xstate.area_bytes(xcr0), ..ZERO },
            2..8 if mask & 1 << subleaf != 0 => {
                let component = components[subleaf as usize - 2];
                CpuIdResult { eax: component.size, ebx: component.offset, ..ZERO }
            }
            _ => ZERO,
        }
    }

    /// The answer to EAX = `leaf`, ECX = `subleaf`. A leaf above the highest basic one answers as
    /// the highest basic one does, as Intel's CPUs do. [`OSXSAVE`] and leaf 0xd
    /// ([`Self::extended_state`]) depend on the guest's state, and are the caller's.
    #[inline]
    pub fn answer(&self, leaf: u32, subleaf: u32) -> CpuIdResult {
        match leaf {
            4 => self.cache.get(subleaf as usize).copied().unwrap_or(ZERO),
            7 if subleaf != 0 => ZERO,
            0..=MAX_BASIC => self.basic[leaf as usize],
            0x8000_0000..=MAX_EXTENDED => self.extended[(leaf & 0xff) as usize],
            0x4000_0000 => self.hypervisor,
            0x4000_0001..=0x4fff_ffff => ZERO,
            _ => self.answer(self.basic[0].eax.min(MAX_BASIC), subleaf),
        }
    }

    /// What the guest may set in CR4 on account of these features: SDM volume 3, section "Control
    /// Registers". VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT are always there.
    pub fn cr4_allowed(&self) -> u64 {
        const ALWAYS: u64 = 0x7ff;
        let (one, seven) = (self.basic[1], self.basic[7]);
        [
            // UMIP, FSGSBASE, PCID, XSAVE, SMEP, SMAP.
            (seven.ecx, 2, 11),
            (seven.ebx, 0, 16),
            (one.ecx, 17, 17),
            (one.ecx, 26, 18),
            (seven.ebx, 7, 20),
            (seven.ebx, 20, 21),
        ]
        .into_iter()
        .filter(|(features, bit, _)| features & 1 << bit != 0)
        .fold(ALWAYS, |cr4, (_, _, flag)| cr4 | 1 << flag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A CPU that claims every bit of every leaf.
    #[derive(Clone)]
    struct Everything;
    impl CpuIdReader for Everything {
        fn cpuid2(&self, leaf: u32, _: u32) -> CpuIdResult {
            match leaf {
                0 => CpuIdResult { eax: 0x21, ebx: 1, ecx: 2, edx: 3 },
                0x8000_0000 => CpuIdResult { eax: 0x8000_0008, ..ZERO },
                _ => CpuIdResult { eax: ALL, ebx: ALL, ecx: ALL, edx: ALL },
            }
        }
    }

    const ALL_OFFERED: Offer = Offer { sld_exposed: true, rdtscp: true, invpcid: true };
    const NOTHING_OFFERED: Offer = Offer { sld_exposed: false, rdtscp: false, invpcid: false };

    #[test]
    fn vmx_and_what_is_not_virtualized_stay_hidden() {
        let table = CpuidTable::new(&Everything, ALL_OFFERED);
        let one = table.answer(1, 0);
        let ecx = [(3, "MONITOR"), (5, "VMX"), (6, "SMX"), (21, "x2APIC"), (24, "TSC deadline")];
        for (bit, name) in ecx {
            assert_eq!(one.ecx & 1 << bit, 0, "{name}");
        }
        for (bit, name) in [(7, "MCE"), (9, "APIC"), (12, "MTRR"), (14, "MCA")] {
            assert_eq!(one.edx & 1 << bit, 0, "{name}");
        }
        for (bit, name) in [(2, "SGX"), (4, "HLE"), (11, "RTM"), (25, "processor trace")] {
            assert_eq!(table.answer(7, 0).ebx & 1 << bit, 0, "{name}");
        }
        for (bit, name) in [(3, "PKU"), (5, "WAITPKG"), (16, "LA57"), (22, "RDPID")] {
            assert_eq!(table.answer(7, 0).ecx & 1 << bit, 0, "{name}");
        }
    }

    #[test]
    fn what_is_not_offered_is_not_told() {
        let table = CpuidTable::new(&Everything, NOTHING_OFFERED);
        assert_eq!(table.answer(7, 0).edx & CORE_CAPABILITIES, 0);
        assert_eq!((table.answer(1, 0).ecx & 1 << 17, table.answer(7, 0).ebx & 1 << 10), (0, 0));
        assert_eq!(table.answer(0x8000_0001, 0).edx & 1 << 27, 0);
        let table = CpuidTable::new(&Everything, ALL_OFFERED);
        assert_ne!(table.answer(7, 0).edx & CORE_CAPABILITIES, 0);
        assert_ne!(table.answer(0x8000_0001, 0).edx & 1 << 27, 0);
        assert_eq!(table.answer(7, 1), ZERO);
    }

    #[test]
    fn without_usable_components_there_is_no_avx() {
        // This CPU's components all lie at 2^32 - 1: none fits.
        let table = CpuidTable::new(&Everything, ALL_OFFERED);
        assert_eq!(table.xstate().mask, xstate::X87 | xstate::SSE);
        assert_eq!(table.answer(1, 0).ecx & bits(&[12, 28, 29]), 0);
        assert_eq!(table.answer(7, 0).ebx & bits(&[5, 16, 30]), 0);
        assert_eq!(table.extended_state(0, 3).eax, 3);
        assert_eq!(table.extended_state(2, 3), ZERO);
    }

    #[test]
    fn the_hypervisor_is_announced() {
        let table = CpuidTable::new(&Everything, NOTHING_OFFERED);
        assert_ne!(table.answer(1, 0).ecx & HYPERVISOR, 0);
        assert_eq!(table.answer(0x4000_0000, 0).ebx.to_le_bytes(), *b"Unsp");
    }

    #[test]
    fn every_leaf_has_an_answer() {
        let table = CpuidTable::new(&Everything, ALL_OFFERED);
        for leaf in (0..0x100).chain(0x3fff_fff0..0x4000_0100).chain(0x7fff_fff0..0x8000_0100) {
            for subleaf in [0, 1, 7, 8, u32::MAX] {
                let _ = table.answer(leaf, subleaf);
            }
        }
        assert_eq!(table.answer(0x1234, 0), table.answer(MAX_BASIC, 0));
        assert_eq!(table.answer(u32::MAX, 0), table.answer(MAX_BASIC, 0));
    }

    #[test]
    fn cr4_follows_the_features() {
        let cr4 = CpuidTable::new(&Everything, NOTHING_OFFERED).cr4_allowed();
        assert_eq!(cr4, 0x7ff | 1 << 11 | 1 << 16 | 1 << 18 | 1 << 20 | 1 << 21);
        let cr4 = CpuidTable::new(&Everything, ALL_OFFERED).cr4_allowed();
        assert_eq!(cr4 & (1 << 13 | 1 << 17), 1 << 17, "VMXE never, PCIDE where INVPCID works");
    }
}
