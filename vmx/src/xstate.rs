//! Extended state: XCR0, and the area that XSAVE and XRSTOR move it through.
//!
//! Source: SDM volume 1, chapter "Managing State Using the XSAVE Feature Set".

use core::arch::asm;

use raw_cpuid::CpuIdReader;

/// XCR0: x87.
pub const X87: u64 = 1 << 0;
/// XCR0: XMM registers.
pub const SSE: u64 = 1 << 1;
/// XCR0: upper halves of YMM registers.
pub const AVX: u64 = 1 << 2;
/// XCR0: opmask registers, upper halves of ZMM0 to 15, ZMM16 to 31. All three or none.
pub const AVX512: u64 = 7 << 5;

/// The components that guests may use. AMX and what is supervisor-only stay out: their areas are
/// large, and no guest needs them to split a lock.
const OFFERED: u64 = X87 | SSE | AVX | AVX512;

/// Room for all offered components in the standard format: 2696 bytes with AVX-512.
pub const AREA_BYTES: usize = 4096;
/// The legacy region and the XSAVE header, which every area has.
const LEGACY_BYTES: u32 = 512 + 64;

/// Where a component lies in the standard format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Component {
    /// From the start of the area, in bytes.
    pub offset: u32,
    /// In bytes.
    pub size: u32,
    /// Whether it starts at a multiple of 64 bytes in the compacted format.
    pub aligned: bool,
}

/// The extended state that this CPU has and guests may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XState {
    /// XCR0 with all of it enabled; 0 on a CPU without XSAVE.
    pub mask: u64,
    /// Components 2 to 7.
    pub components: [Component; 6],
    /// CPUID.(0xd,1):EAX bits for XSAVEOPT, XSAVEC and XGETBV with ECX = 1.
    pub instructions: u32,
}

impl XState {
    /// No XSAVE: x87 and SSE by FXSAVE.
    pub const LEGACY: Self = Self {
        mask: 0,
        components: [Component { offset: 0, size: 0, aligned: false }; 6],
        instructions: 0,
    };

    /// Asks CPUID. A component that does not fit the area, or overlaps the legacy region, is not
    /// offered: some machines enumerate sizes that do not add up.
    pub fn read(cpu: &impl CpuIdReader) -> Self {
        if cpu.cpuid1(0).eax < 0xd || cpu.cpuid1(1).ecx & 1 << 26 == 0 {
            return Self::LEGACY;
        }
        let leaf = cpu.cpuid2(0xd, 0);
        let mut mask = (u64::from(leaf.edx) << 32 | u64::from(leaf.eax)) & OFFERED;
        // XSETBV takes no XCR0 without x87, nor AVX without SSE; this mask is to be one.
        if mask & (X87 | SSE) != X87 | SSE {
            return Self::LEGACY;
        }
        let mut components = [Component::default(); 6];
        for (index, component) in (2u32..).zip(&mut components) {
            if mask & 1 << index == 0 {
                continue;
            }
            let leaf = cpu.cpuid2(0xd, index);
            let end = u64::from(leaf.eax) + u64::from(leaf.ebx);
            if leaf.ebx < LEGACY_BYTES || end > AREA_BYTES as u64 {
                mask &= !(1 << index);
            } else {
                let aligned = leaf.ecx & 1 << 1 != 0;
                *component = Component { offset: leaf.ebx, size: leaf.eax, aligned };
            }
        }
        if mask & AVX == 0 || mask & AVX512 != AVX512 {
            mask &= !AVX512;
        }
        Self { mask, components, instructions: cpu.cpuid2(0xd, 1).eax & 7 }
    }

    /// Bytes that an area for the components of `xcr0` takes.
    pub fn area_bytes(&self, xcr0: u64) -> u32 {
        (2u32..)
            .zip(self.components)
            .filter(|(index, _)| xcr0 & 1 << index != 0)
            .map(|(_, component)| component.offset + component.size)
            .fold(LEGACY_BYTES, u32::max)
    }

    /// Bytes that XSAVEC takes for the components of `xcr0`: SDM volume 1, section "Compacted
    /// Format of the Extended Region of an XSAVE Area".
    pub fn compacted_bytes(&self, xcr0: u64) -> u32 {
        (2u32..).zip(self.components).filter(|(index, _)| xcr0 & 1 << index != 0).fold(
            LEGACY_BYTES,
            |end, (_, component)| {
                let start = if component.aligned { end.next_multiple_of(64) } else { end };
                start + component.size
            },
        )
    }

    /// Whether XSETBV takes this value for XCR0 where these components are supported.
    pub const fn allows(&self, xcr0: u64) -> bool {
        let avx512 = xcr0 & AVX512;
        self.mask != 0
            && xcr0 & !self.mask == 0
            && xcr0 & X87 != 0
            && (xcr0 & AVX == 0 || xcr0 & SSE != 0)
            && (avx512 == 0 || avx512 == AVX512 && xcr0 & AVX != 0)
    }
}

/// A vCPU's extended state while another one is loaded.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct XArea([u8; AREA_BYTES]);

const _: () = assert!(align_of::<XArea>() == 64);

impl XArea {
    /// As after reset: FCW 0x37f, MXCSR 0x1f80, everything else in its initial state (the header
    /// that follows the legacy region says so with its zeros, but for x87 and SSE).
    pub const fn reset() -> Self {
        let mut area = [0; AREA_BYTES];
        (area[0], area[1]) = (0x7f, 0x03);
        (area[24], area[25]) = (0x80, 0x1f);
        area[512] = (X87 | SSE) as u8;
        Self(area)
    }

    /// Loads this state, then `xcr0`.
    ///
    /// # Safety
    ///
    /// `mask` is [`XState::mask`] of this CPU; if it is not 0, CR4.OSXSAVE is set and `xcr0` is
    /// allowed. Nothing of the host is in the registers.
    pub unsafe fn restore(&self, mask: u64, xcr0: u64) {
        // SAFETY: the area is aligned, and holds what `save` or `reset` wrote.
        unsafe {
            if mask == 0 {
                asm!("fxrstor64 [{}]", in(reg) &raw const self.0, clobber_abi("sysv64"),
                     options(nostack));
                return;
            }
            xsetbv(mask);
            asm!("xrstor64 [{}]", in(reg) &raw const self.0, inout("eax") mask as u32 => _,
                 inout("edx") (mask >> 32) as u32 => _, clobber_abi("sysv64"), options(nostack));
            xsetbv(xcr0);
        }
    }

    /// Stores the state that is in the registers.
    ///
    /// # Safety
    ///
    /// As for [`Self::restore`].
    pub unsafe fn save(&mut self, mask: u64) {
        // SAFETY: the area is aligned, and large enough for all components of `mask`.
        unsafe {
            if mask == 0 {
                asm!("fxsave64 [{}]", in(reg) &raw mut self.0, options(nostack));
                return;
            }
            xsetbv(mask);
            asm!("xsave64 [{}]", in(reg) &raw mut self.0, in("eax") mask as u32,
                 in("edx") (mask >> 32) as u32, options(nostack));
        }
    }
}

/// Writes XCR0.
///
/// # Safety
///
/// CR4.OSXSAVE is set, and the CPU takes the value.
pub(crate) unsafe fn xsetbv(value: u64) {
    // SAFETY: the caller's obligation.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nomem, nostack));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use raw_cpuid::CpuIdResult;

    /// Leaf 0xd of a CPU with AVX-512, with the offset of component 5 to be chosen.
    #[derive(Clone)]
    struct Cpu {
        opmask_offset: u32,
    }

    impl CpuIdReader for Cpu {
        fn cpuid2(&self, leaf: u32, subleaf: u32) -> CpuIdResult {
            let (eax, ebx, ecx) = match (leaf, subleaf) {
                (0, _) => (0x16, 0, 0),
                (1, _) => (0, 0, 1 << 26),
                (0xd, 0) => (0x2e7, 0, 0),
                (0xd, 1) => (0xf, 0, 0),
                (0xd, 2) => (256, 576, 0),
                (0xd, 5) => (64, self.opmask_offset, 0),
                (0xd, 6) => (512, 1152, 0),
                (0xd, 7) => (1024, 1664, 0),
                _ => (0, 0, 0),
            };
            CpuIdResult { eax, ebx, ecx, edx: 0 }
        }
    }

    #[test]
    fn sizes_follow_the_enabled_components() {
        let state = XState::read(&Cpu { opmask_offset: 1088 });
        assert_eq!(state.mask, 0xe7);
        assert_eq!(state.area_bytes(X87), 576);
        assert_eq!(state.area_bytes(X87 | SSE | AVX), 832);
        assert_eq!(state.area_bytes(0xe7), 2688);
        assert_eq!(state.compacted_bytes(0xe7), 576 + 256 + 64 + 512 + 1024);
        assert_eq!(state.instructions, 7);
    }

    #[test]
    fn a_component_that_does_not_fit_is_not_offered() {
        for offset in [0, 575, AREA_BYTES as u32 - 63, u32::MAX] {
            let state = XState::read(&Cpu { opmask_offset: offset });
            assert_eq!(state.mask, X87 | SSE | AVX, "{offset}");
        }
    }

    #[test]
    fn without_x87_and_sse_there_is_no_xsave() {
        for mask in [0, 1, 2, 4, 5, 6] {
            let cpu = |leaf: u32, subleaf: u32| match (leaf, subleaf) {
                (0xd, 0) => CpuIdResult { eax: mask, ebx: 0, ecx: 0, edx: 0 },
                _ => Cpu { opmask_offset: 1088 }.cpuid2(leaf, subleaf),
            };
            assert_eq!(XState::read(&cpu), XState::LEGACY, "{mask:#x}");
        }
    }

    proptest! {
        /// SDM volume 1, section "Enabling the XSAVE Feature Set and XSAVE-Enabled Features": of
        /// these components there are four combinations.
        #[test]
        fn xcr0_rules(mask in prop::sample::select(&[0u64, 3, 7, 0xe7]), high: u64) {
            let state = XState { mask, ..XState::read(&Cpu { opmask_offset: 1088 }) };
            for value in (0..0x400).chain([high, high & !0x3ff | 0xe7, mask | 1 << 63]) {
                let legal = [0b1, 0b11, 0b111, 0b1110_0111].contains(&value);
                prop_assert_eq!(state.allows(value), legal && value & !mask == 0, "{:#x}", value);
            }
        }
    }
}
