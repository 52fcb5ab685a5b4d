//! CPUID as guests see it: computed once per vCPU, looked up at each exit.
//!
//! What the CPU says is filtered by a table of feature bits that the hypervisor can stand behind;
//! everything else reads as zero. Leaves: SDM volume 2, "CPUID—CPU Identification".

use raw_cpuid::{CpuIdReader, CpuIdResult};

use crate::paravirtual;
use crate::xstate::{self, Component, XState};

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
        // CLFLUSH line size.
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
    /// The vCPU's local APIC ID, below `vcpus`.
    pub apic_id: u32,
    /// How many vCPUs the VM has, 1 to 16: each a core of one thread, all of them one package.
    pub vcpus: u32,
}

impl Offer {
    /// How many APIC IDs the package takes, as leaves 1 and 4 count them: a power of two.
    const fn ids(&self) -> u32 {
        self.vcpus.next_power_of_two()
    }
}

/// Leaf 1, ECX: CR4.OSXSAVE is set.
pub const OSXSAVE: u32 = 1 << 27;
/// Leaf 1: the local APIC that each vCPU has, whatever the CPU has. EDX: APIC; ECX: x2APIC, TSC
/// deadline.
const APIC_EDX: u32 = 1 << 9;
/// As [`APIC_EDX`].
const APIC_ECX: u32 = 1 << 21 | 1 << 24;
/// Leaf 1, EDX: HTT, the package has more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 0xd, subleaf 1, EAX: XSAVEC.
const XSAVEC: u32 = 1 << 1;
/// Leaf 7, EDX: IA32_CORE_CAPABILITIES exists.
const CORE_CAPABILITIES: u32 = 1 << 30;

/// Rows for basic leaves: a power of two, for quick look-up.
const BASIC_ROWS: usize = 32;
const _: () = assert!(MAX_BASIC < BASIC_ROWS as u32);
/// Basic leaves whose answer depends on the subleaf or on the guest's state.
const NOT_PLAIN: u32 = bits(&[1, 4, 7, 0xb, 0xd]);

/// The answers for one vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuidTable {
    basic: [CpuIdResult; BASIC_ROWS],
    /// Bit n: the answer to basic leaf n is `basic[n]`, whatever the subleaf and the guest's state.
    plain: u32,
    /// Cache parameters (leaf 4), by subleaf.
    cache: [CpuIdResult; SUBLEAVES],
    extended: [CpuIdResult; (MAX_EXTENDED & 0xff) as usize + 1],
    hypervisor: CpuIdResult,
    xstate: XState,
    /// Leaf 0xb: threads, cores, and the end of the list.
    topology: [CpuIdResult; 3],
}

impl CpuidTable {
    /// Asks the CPU and filters.
    pub fn new(cpu: &impl CpuIdReader, offer: Offer) -> Self {
        let mut table = Self {
            basic: [ZERO; BASIC_ROWS],
            plain: 0,
            cache: [ZERO; SUBLEAVES],
            extended: [ZERO; (MAX_EXTENDED & 0xff) as usize + 1],
            hypervisor: ZERO,
            xstate: XState::read(cpu),
            topology: [ZERO; 3],
        };
        let vendor = cpu.cpuid2(0, 0);
        let extended = cpu.cpuid2(0x8000_0000, 0);
        let max_basic = vendor.eax.min(MAX_BASIC);
        let max_extended = extended.eax.clamp(0x8000_0000, MAX_EXTENDED);
        table.basic[0] = CpuIdResult { eax: max_basic, ..vendor };
        table.plain = (1..=max_basic).fold(1, |plain, leaf| plain | 1 << leaf) & !NOT_PLAIN;
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
                // EAX bits 31:26: the IDs of cores in the package, less 1. Bits 25:14: those of
                // threads that share the cache, less 1. From the third level (bits 7:5) on all do.
                let sharing = if raw.eax >> 5 & 7 >= 3 { offer.ids() } else { 1 };
                let counts = (offer.ids() - 1) << 26 | (sharing - 1) << 14;
                *row = CpuIdResult { eax: raw.eax & 0x3fff | counts, ..raw };
            }
        }
        table.basic[1].ecx |= HYPERVISOR | APIC_ECX;
        table.basic[1].edx |= APIC_EDX;
        // 31:24 the initial APIC ID, 23:16 the IDs of logical processors in the package.
        table.basic[1].ebx |= offer.apic_id << 24 | offer.ids() << 16;
        if offer.vcpus > 1 {
            table.basic[1].edx |= HTT;
        }
        // The level's type (1 is SMT, 2 is core, 0 ends the list), its logical processors, and how
        // many bits of the ID are below the next level's.
        let levels = [(1, 1, 0), (2, offer.vcpus, offer.ids().trailing_zeros()), (0, 0, 0)];
        for ((subleaf, row), (kind, count, shift)) in (0..).zip(&mut table.topology).zip(levels) {
            let ecx = kind << 8 | subleaf;
            *row = CpuIdResult { eax: shift, ebx: count, ecx, edx: offer.apic_id };
        }
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
            CpuIdResult { eax: paravirtual::LEAF, ebx: word(0), ecx: word(4), edx: word(8) };
        table
    }

    /// The leaf in which what another CPU offers a guest differs, if a guest could find out to its
    /// harm: features, the layout of extended state, the width of addresses, family and model.
    ///
    /// A guest is told what its first CPU says, wherever it runs. What describes a CPU and lets nobody
    /// do anything does not count: caches, frequencies, names, the stepping. The cores of a hybrid
    /// CPU differ in that.
    pub fn differs_from(&self, other: &Self) -> Option<u32> {
        /// Basic and extended leaves that only describe: 2, 4, 0x15, 0x16; names, caches.
        const BASIC: u32 = bits(&[2, 4, 0x15, 0x16]);
        const EXTENDED: u32 = bits(&[2, 3, 4, 6]);
        let row = |leaf, mut row: CpuIdResult| {
            if leaf == 1 {
                // The stepping.
                row.eax &= !0xf;
            }
            row
        };
        let differs = |mine: &[CpuIdResult], others: &[CpuIdResult], descriptive: u32| {
            let rows = (0..).zip(mine.iter().zip(others));
            let mut rows = rows.filter(|(leaf, _)| descriptive & 1 << leaf == 0);
            let found = rows.find(|(leaf, (one, two))| row(*leaf, **one) != row(*leaf, **two));
            found.map(|(leaf, _)| leaf)
        };
        let basic = differs(&self.basic, &other.basic, BASIC);
        let extended = || {
            let leaf = differs(&self.extended, &other.extended, EXTENDED);
            leaf.map(|leaf| leaf | 0x8000_0000)
        };
        let xstate = || (self.xstate != other.xstate).then_some(0xd);
        basic.or_else(extended).or_else(xstate)
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
    #[inline(never)]
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
            // The size is told where there is XSAVEC.
            1 if instructions & XSAVEC == 0 => CpuIdResult { eax: instructions, ..ZERO },
            1 => CpuIdResult { eax: instructions, ebx: self.xstate.compacted_bytes(xcr0), ..ZERO },
            2..8 if mask & 1 << subleaf != 0 => {
                let Component { offset, size, aligned } = components[subleaf as usize - 2];
                CpuIdResult { eax: size, ebx: offset, ecx: u32::from(aligned) << 1, edx: 0 }
            }
            _ => ZERO,
        }
    }

    /// The answer to a basic leaf that needs no more than a look.
    #[inline(always)]
    pub fn plain(&self, leaf: u32) -> Option<&CpuIdResult> {
        let plain = leaf < BASIC_ROWS as u32 && self.plain >> leaf & 1 != 0;
        plain.then(|| &self.basic[leaf as usize % BASIC_ROWS])
    }

    /// The answer to EAX = `leaf`, ECX = `subleaf`. A leaf above the highest basic one answers as
    /// the highest basic one does, as Intel's CPUs do. [`OSXSAVE`], leaf 0xd
    /// ([`Self::extended_state`]) and [`paravirtual::LEAF`] depend on the guest's state and policy, and
    /// are the caller's.
    pub fn answer(&self, leaf: u32, subleaf: u32) -> &CpuIdResult {
        match leaf {
            1.. if self.plain(leaf).is_some() => &self.basic[leaf as usize % BASIC_ROWS],
            0 | 1 => &self.basic[leaf as usize],
            4 => self.cache.get(subleaf as usize).unwrap_or(&ZERO),
            7 if subleaf == 0 && self.basic[0].eax >= 7 => &self.basic[7],
            7 if self.basic[0].eax >= 7 => &ZERO,
            0xb if self.basic[0].eax >= 0xb => &self.topology[(subleaf as usize).min(2)],
            0x8000_0000..=MAX_EXTENDED if leaf <= self.extended[0].eax => {
                &self.extended[(leaf & 0xff) as usize]
            }
            0x4000_0000 => &self.hypervisor,
            // The first of them, [`paravirtual::LEAF`], depends on the policy.
            0x4000_0001..=0x4fff_ffff => &ZERO,
            // A leaf with subleaves that the CPU does not have, or one above the highest.
            _ => self.highest_answer(subleaf),
        }
    }

    fn highest_answer(&self, subleaf: u32) -> &CpuIdResult {
        match self.basic[0].eax {
            4 => self.cache.get(subleaf as usize).unwrap_or(&ZERO),
            7 if subleaf != 0 => &ZERO,
            0xb => &self.topology[(subleaf as usize).min(2)],
            highest => &self.basic[highest as usize % BASIC_ROWS],
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
    use proptest::prelude::*;
    use std::{collections::BTreeMap, vec::Vec};

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

    const ALL_OFFERED: Offer =
        Offer { sld_exposed: true, rdtscp: true, invpcid: true, apic_id: 0, vcpus: 1 };
    const NOTHING_OFFERED: Offer =
        Offer { sld_exposed: false, rdtscp: false, invpcid: false, ..ALL_OFFERED };

    /// A core of a CPU like Alder Lake.
    #[derive(Clone)]
    struct HybridCore {
        efficient: bool,
        /// A leaf, and what is different there.
        odd: Option<(u32, CpuIdResult)>,
    }

    impl CpuIdReader for HybridCore {
        fn cpuid2(&self, leaf: u32, subleaf: u32) -> CpuIdResult {
            let plain = |eax, ebx, ecx, edx| CpuIdResult { eax, ebx, ecx, edx };
            let by_core = |performance, efficient| {
                if self.efficient { efficient } else { performance }
            };
            let answer = match (leaf, subleaf) {
                (0, _) => plain(0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
                (1, _) => plain(0x9_0672, 0x80_0800, 0x7ffa_fbff, 0xbfeb_fbff),
                (2, _) => plain(by_core(0x00fe_ff01, 0x00fe_ff02), 0xf0, 0, 0),
                (4, 0) => plain(0x1c00_4121, by_core(0x2c0_003f, 0x1c0_003f), 0x3f, 0),
                (4, 2) => plain(0x1c00_4143, by_core(0x240_003f, 0x3c0_003f), 0x7ff, 0),
                // Leaf 7: what guests do not see differs, Intel PT's neighbours and RTM among it.
                (7, 0) => plain(2, by_core(0x239c_2feb, 0x239c_27eb), 0x9840_07ac, 0xfc1c_c410),
                (0xa, _) => plain(by_core(0x0830_0805, 0x0630_0605), 0, 0, 0x8603),
                (0xd, 0) => plain(7, 0x340, 0x340, 0),
                (0xd, 1) => plain(0xf, 0x340, 0, 0),
                (0xd, 2) => plain(0x100, 0x240, 0, 0),
                (0x16, _) => plain(by_core(3200, 2400), by_core(5200, 3900), 100, 0),
                (0x1a, _) => plain(by_core(0x4000_0001, 0x2000_0001), 0, 0, 0),
                (0x8000_0000, _) => plain(0x8000_0008, 0, 0, 0),
                (0x8000_0001, _) => plain(0, 0, 0x121, 0x2c10_0800),
                (0x8000_0006, _) => plain(0, 0, by_core(0x0500_6040, 0x0800_6040), 0),
                (0x8000_0007, _) => plain(0, 0, 0, 0x100),
                (0x8000_0008, _) => plain(0x302e, 0, 0, 0),
                _ => ZERO,
            };
            match self.odd {
                Some((at, odd)) if (at, 0) == (leaf, subleaf) => plain(
                    answer.eax ^ odd.eax,
                    answer.ebx ^ odd.ebx,
                    answer.ecx ^ odd.ecx,
                    answer.edx ^ odd.edx,
                ),
                _ => answer,
            }
        }
    }

    #[test]
    fn the_cores_of_a_hybrid_cpu_can_run_the_same_guests() {
        let table = |efficient, odd| CpuidTable::new(&HybridCore { efficient, odd }, ALL_OFFERED);
        let performance = table(false, None);
        assert_ne!(table(true, None), performance);
        assert_eq!(table(true, None).differs_from(&performance), None);
        assert_eq!(performance.differs_from(&table(true, None)), None);
        let odd = |leaf, eax, ebx, ecx, edx| {
            let odd = Some((leaf, CpuIdResult { eax, ebx, ecx, edx }));
            let differs = table(true, odd).differs_from(&performance);
            assert_eq!(performance.differs_from(&table(true, odd)), differs);
            differs
        };
        // AVX-512 on one kind only (the first of them had it), FMA, NX, the width of addresses, another
        // model, extended state.
        assert_eq!(odd(7, 0, 1 << 5, 0, 0), Some(7));
        assert_eq!(odd(1, 0, 0, 1 << 12, 0), Some(1));
        assert_eq!(odd(0x8000_0001, 0, 0, 0, 1 << 20), Some(0x8000_0001));
        assert_eq!(odd(0x8000_0008, 0xf, 0, 0, 0), Some(0x8000_0008));
        assert_eq!(odd(1, 1 << 4, 0, 0, 0), Some(1));
        assert_eq!(odd(0xd, 4, 0, 0, 0), Some(1));
        // Another stepping.
        assert_eq!(odd(1, 1, 0, 0, 0), None);
    }

    #[test]
    fn vmx_and_what_is_not_virtualized_stay_hidden() {
        let table = CpuidTable::new(&Everything, ALL_OFFERED);
        let one = table.answer(1, 0);
        let ecx = [(3, "MONITOR"), (5, "VMX"), (6, "SMX")];
        for (bit, name) in ecx {
            assert_eq!(one.ecx & 1 << bit, 0, "{name}");
        }
        for (bit, name) in [(7, "MCE"), (12, "MTRR"), (14, "MCA")] {
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
        assert_eq!(*table.answer(7, 1), ZERO);
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

    // ---- Topology ----------------------------------------------------------------------------

    /// A CPU with the caches of a client CPU: the sharing is the real one, for 16 threads.
    #[derive(Clone)]
    struct Cached;
    impl CpuIdReader for Cached {
        fn cpuid2(&self, leaf: u32, subleaf: u32) -> CpuIdResult {
            let cache = |kind: u32, level: u32, sharing: u32| {
                7 << 26 | (sharing - 1) << 14 | level << 5 | kind
            };
            match (leaf, subleaf) {
                (0, _) => CpuIdResult { eax: 0x21, ..ZERO },
                (4, 0) => CpuIdResult { eax: cache(1, 1, 2), ebx: 0x02c0_003f, ecx: 63, edx: 0 },
                (4, 1) => CpuIdResult { eax: cache(2, 1, 2), ebx: 0x01c0_003f, ecx: 63, edx: 0 },
                (4, 2) => CpuIdResult { eax: cache(3, 2, 2), ebx: 0x0240_003f, ecx: 1023, edx: 0 },
                (4, 3) => CpuIdResult { eax: cache(3, 3, 16), ebx: 0x02c0_003f, ecx: 8191, edx: 4 },
                (4, _) => ZERO,
                _ => CpuIdResult { eax: ALL, ebx: ALL, ecx: ALL, edx: ALL },
            }
        }
    }

    /// SMT ID, core ID, package ID, and the IDs of what shares the caches, by subleaf of leaf 4.
    type Place = (u32, u32, u32, Vec<u32>);

    /// Bits that a mask needs for so many IDs.
    fn width(ids: u32) -> u32 {
        ids.next_power_of_two().trailing_zeros()
    }

    fn caches(table: &CpuidTable, id: u32) -> Vec<u32> {
        let parameters = (0..).map(|subleaf| table.answer(4, subleaf).eax);
        let caches = parameters.take_while(|eax| eax & 0x1f != 0);
        caches.map(|eax| id >> width((eax >> 14 & 0xfff) + 1)).collect()
    }

    /// SDM volume 3, section "Hierarchical Mapping of CPUID Extended Topology Leaf".
    fn place_by_leaf_b(table: &CpuidTable) -> Place {
        let (smt, core) = (*table.answer(0xb, 0), *table.answer(0xb, 1));
        assert_eq!((smt.ecx, core.ecx), (0x100, 0x201));
        let last = table.answer(0xb, 2);
        assert_eq!((last.eax, last.ebx, last.ecx, last.edx), (0, 0, 2, core.edx));
        assert!(smt.ebx <= 1 << smt.eax && core.ebx <= 1 << core.eax);
        let id = core.edx;
        assert_eq!(smt.edx, id);
        let low = |bits: u32| id & ((1 << bits) - 1);
        (low(smt.eax), low(core.eax) >> smt.eax, id >> core.eax, caches(table, id))
    }

    /// SDM volume 3, section "Algorithm for Three-Level Mappings of APIC_ID", for software that
    /// does not know leaf 0xb.
    fn place_by_leaves_1_and_4(table: &CpuidTable) -> Place {
        let one = table.answer(1, 0);
        let id = one.ebx >> 24;
        let threads = if one.edx & HTT == 0 { 1 } else { one.ebx >> 16 & 0xff };
        let cores = (table.answer(4, 0).eax >> 26) + 1;
        let smt_width = width(threads / cores);
        let package_width = smt_width + width(cores);
        let low = |bits: u32| id & ((1 << bits) - 1);
        (low(smt_width), low(package_width) >> smt_width, id >> package_width, caches(table, id))
    }

    #[test]
    fn each_vcpu_is_a_core_of_one_package() {
        for vcpus in 1..=16 {
            for apic_id in 0..vcpus {
                let offer = Offer { apic_id, vcpus, ..ALL_OFFERED };
                let table = CpuidTable::new(&Cached, offer);
                let place = (0, apic_id, 0, Vec::from([apic_id, apic_id, apic_id, 0]));
                assert_eq!(place_by_leaf_b(&table), place, "{offer:?}");
                assert_eq!(place_by_leaves_1_and_4(&table), place, "{offer:?}");
                assert_eq!(table.answer(0xb, 1).ebx, vcpus);
                assert_eq!(table.answer(1, 0).edx & HTT != 0, vcpus > 1);
                // The rest of leaf 4 is the CPU's.
                for subleaf in 0..5 {
                    let (seen, there) = (*table.answer(4, subleaf), Cached.cpuid2(4, subleaf));
                    assert_eq!(CpuIdResult { eax: 0, ..seen }, CpuIdResult { eax: 0, ..there });
                    assert_eq!((seen.eax ^ there.eax) & 0x3fff, 0);
                }
            }
        }
        // Leaf 0x1f is above the highest.
        let table = CpuidTable::new(&Cached, Offer { vcpus: 16, ..ALL_OFFERED });
        assert_eq!(table.answer(0x1f, 0), table.answer(MAX_BASIC, 0));
    }

    // ---- Random CPUs -----------------------------------------------------------------------------

    /// A CPU with arbitrary features, but leaves and components as CPUs lay them out.
    #[derive(Debug, Clone)]
    struct AnyCpu {
        seed: u64,
        /// All, half or few of the bits are set.
        density: u32,
        max_basic: u32,
        max_extended: u32,
        components: [(u32, u32, u32); 6],
    }

    impl CpuIdReader for AnyCpu {
        fn cpuid2(&self, leaf: u32, subleaf: u32) -> CpuIdResult {
            let word = |register: u64| {
                let mut value = if self.density == 0 { ALL } else { 0 };
                for round in 0..u64::from(self.density) {
                    let at = u64::from(leaf) << 32 | u64::from(subleaf) << 8 | register << 4;
                    let mixed = (at ^ round ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    let mixed = (mixed ^ mixed >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    let random = (mixed >> 32) as u32;
                    value = if round == 0 { random } else { value & random };
                }
                value
            };
            let any = CpuIdResult { eax: word(0), ebx: word(1), ecx: word(2), edx: word(3) };
            match (leaf, subleaf) {
                (0, _) => CpuIdResult { eax: self.max_basic, ..any },
                (0x8000_0000, _) => CpuIdResult { eax: self.max_extended, ..any },
                (0xd, 0) => CpuIdResult { eax: any.eax | 3, ..any },
                (0xd, 2..8) => {
                    let (eax, ebx, ecx) = self.components[subleaf as usize - 2];
                    CpuIdResult { eax, ebx, ecx, edx: 0 }
                }
                _ => any,
            }
        }
    }

    prop_compose! {
        fn any_cpu()(
            seed: u64,
            density in 0u32..4,
            max_basic in prop_oneof![1u32..0x20, 0xdu32..0x17],
            max_extended in prop_oneof![4 => 0x8000_0000u32..0x8000_0020, 1 => any::<u32>()],
            sizes: [u8; 6],
            gaps: [u8; 6],
            flags: [u32; 6],
            order in Just([0, 1, 2, 3, 4, 5]).prop_shuffle(),
            broken in prop::option::of((0usize..6, any::<(u32, u32, u32)>())),
        ) -> AnyCpu {
            let mut components = [(0, 0, 0); 6];
            let mut end = 576;
            for index in order {
                let (size, offset) = (u32::from(sizes[index]) * 4, end + u32::from(gaps[index]));
                components[index] = (size, offset, flags[index]);
                end = offset + size;
            }
            if let Some((index, garbage)) = broken {
                components[index] = garbage;
            }
            AnyCpu { seed, density, max_basic, max_extended, components }
        }
    }

    fn any_offer() -> impl Strategy<Value = Offer> {
        let vcpu = (1u32..=16).prop_flat_map(|vcpus| (0..vcpus, Just(vcpus)));
        (any::<[bool; 3]>(), vcpu).prop_map(|([sld_exposed, rdtscp, invpcid], (apic_id, vcpus))| {
            Offer { sld_exposed, rdtscp, invpcid, apic_id, vcpus }
        })
    }

    const DOCUMENT: &str = include_str!("../../docs/guest-view.md");

    /// The bits of a cell such as `0 FPU, 15:8 CLFLUSH line size`, or `all`.
    fn mask_of(cell: &str) -> u32 {
        if cell.starts_with("all") {
            return ALL;
        }
        cell.split(", ").fold(0, |mask, item| {
            let positions = item.split(' ').next().unwrap();
            let (high, low) = positions.split_once(':').unwrap_or((positions, positions));
            let (high, low): (u32, u32) = (high.parse().unwrap(), low.parse().unwrap());
            mask | ALL >> (31 - high) & ALL << low
        })
    }

    /// The document's table of CPUID bits that come from the CPU: leaf to EAX, EBX, ECX, EDX.
    fn documented() -> BTreeMap<u32, [u32; 4]> {
        let section = DOCUMENT
            .lines()
            .skip_while(|line| *line != "### Bits that come from the CPU")
            .skip(1)
            .take_while(|line| !line.starts_with('#'));
        let mut leaves = BTreeMap::new();
        for line in section.filter(|line| line.starts_with("| 0x")) {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let leaf = u32::from_str_radix(&cells[1][2..], 16).unwrap();
            let register = ["EAX", "EBX", "ECX", "EDX"].iter().position(|name| *name == cells[2]);
            let masks: &mut [u32; 4] = leaves.entry(leaf).or_default();
            masks[register.expect("a register")] |= mask_of(cells[3]);
        }
        leaves
    }

    const fn registers(answer: CpuIdResult) -> [u32; 4] {
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    }

    #[test]
    fn the_document_has_these_filters() {
        let filters: BTreeMap<u32, [u32; 4]> =
            FILTERS.iter().map(|row| (row.leaf, [row.eax, row.ebx, row.ecx, row.edx])).collect();
        assert_eq!(documented(), filters);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn guests_see_what_is_documented_and_the_cpu_has(cpu in any_cpu(), offer in any_offer()) {
            let documented = documented();
            let table = CpuidTable::new(&cpu, offer);
            let max_basic = cpu.max_basic.min(MAX_BASIC);
            let max_extended = cpu.max_extended.clamp(0x8000_0000, MAX_EXTENDED);
            prop_assert_eq!(registers(*table.answer(0, 0))[0], max_basic);
            prop_assert_eq!(registers(*table.answer(0x8000_0000, 0)), [max_extended, 0, 0, 0]);
            let leaves = (1..=max_basic).chain(0x8000_0001..=max_extended);
            for leaf in leaves.filter(|leaf| ![4, 0xb, 0xd].contains(leaf)) {
                let seen = registers(*table.answer(leaf, 0));
                let there = registers(cpu.cpuid2(leaf, 0));
                let mut allowed = documented.get(&leaf).copied().unwrap_or_default();
                allowed.iter_mut().zip(there).for_each(|(bits, there)| *bits &= there);
                // What the hypervisor adds.
                match leaf {
                    1 => {
                        allowed[1] |= offer.apic_id << 24 | offer.ids() << 16;
                        allowed[2] |= 1 << 31 | APIC_ECX;
                        allowed[3] |= APIC_EDX | if offer.vcpus > 1 { HTT } else { 0 };
                    }
                    7 if offer.sld_exposed => allowed[3] |= 1 << 30,
                    _ => {}
                }
                for (seen, allowed) in seen.into_iter().zip(allowed) {
                    prop_assert_eq!(seen & !allowed, 0, "{:#x}: {:#x}", leaf, seen);
                }
            }
            // Above the highest leaves.
            for leaf in [max_basic + 1, 0x3fff_ffff, 0x5000_0000, max_extended + 1, u32::MAX] {
                prop_assert_eq!(table.answer(leaf, 0), table.answer(max_basic, 0), "{:#x}", leaf);
            }
        }

        #[test]
        fn features_come_with_what_they_need(cpu in any_cpu(), offer in any_offer()) {
            let table = CpuidTable::new(&cpu, offer);
            let XState { mask, .. } = *table.xstate();
            prop_assert!(mask == 0 || table.xstate().allows(mask), "{:#x}", mask);
            let seen = |leaf, register: usize, bit: u32| {
                registers(*table.answer(leaf, 0))[register] & 1 << bit != 0
            };
            prop_assert!(mask != 0 || !seen(1, 2, 26), "XSAVE");
            if mask & xstate::AVX == 0 {
                for (leaf, register, bit) in [(1, 2, 12), (1, 2, 28), (1, 2, 29)] {
                    prop_assert!(!seen(leaf, register, bit), "{}", bit);
                }
            }
            // A low leaf 7 answers for leaves above it; here it is leaf 7 itself that counts.
            if cpu.max_basic >= 7 && mask & xstate::AVX == 0 {
                prop_assert!(!seen(7, 1, 5) && !seen(7, 2, 9) && !seen(7, 2, 10));
            }
            if cpu.max_basic >= 7 && mask & xstate::AVX512 == 0 {
                let bits = registers(*table.answer(7, 0));
                prop_assert_eq!((bits[1] & 0xd023_0000, bits[2] & 0x5842), (0, 0));
            }
            let cr4 = table.cr4_allowed();
            // VMXE, SMXE, LA57, PKE, CET, PKS, and what is reserved.
            prop_assert_eq!(cr4 & !0x0037_0fff, 0, "{:#x}", cr4);
            prop_assert_eq!(cr4 & 0x7ff, 0x7ff);
            for (flag, leaf, register, bit) in
                [(11, 7, 2, 2), (16, 7, 1, 0), (17, 1, 2, 17), (18, 1, 2, 26), (20, 7, 1, 7), (21, 7, 1, 20)]
            {
                let offered = leaf <= cpu.max_basic && seen(leaf, register, bit);
                prop_assert_eq!(cr4 & 1 << flag != 0, offered, "CR4 bit {}", flag);
            }
        }

        #[test]
        fn extended_state_adds_up(cpu in any_cpu()) {
            let table = CpuidTable::new(&cpu, ALL_OFFERED);
            let mask = table.xstate().mask;
            let values = [1u64, 3, 7, 0xe7].into_iter().filter(|xcr0| table.xstate().allows(*xcr0));
            let (mut standard, mut compacted) = (0, 0);
            for xcr0 in values {
                let (all, small) = (table.extended_state(0, xcr0), table.extended_state(1, xcr0));
                prop_assert_eq!(u64::from(all.edx) << 32 | u64::from(all.eax), mask);
                prop_assert!((576..=xstate::AREA_BYTES as u32).contains(&all.ecx));
                prop_assert!(standard <= all.ebx && all.ebx <= all.ecx);
                prop_assert!(xcr0 != mask || all.ebx == all.ecx);
                prop_assert!(small.eax <= 7 && small.ecx == 0 && small.edx == 0);
                if small.eax & XSAVEC == 0 {
                    prop_assert_eq!(small.ebx, 0);
                } else {
                    prop_assert!(compacted <= small.ebx && small.ebx >= 576);
                    (standard, compacted) = (all.ebx, small.ebx);
                }
                for component in (2..64).filter(|component| xcr0 & 1 << component != 0) {
                    let place = table.extended_state(component, xcr0);
                    prop_assert!(place.ebx >= 576 && place.eax + place.ebx <= all.ebx);
                }
            }
            for subleaf in (2..100).chain([u32::MAX]) {
                let there = subleaf < 64 && mask & 1 << subleaf != 0;
                prop_assert!(there || table.extended_state(subleaf, mask) == ZERO);
            }
        }
    }
}
