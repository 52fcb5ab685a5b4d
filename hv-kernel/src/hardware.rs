//! What this machine is, for the log that is sent in when something does not work.
//!
//! All of it is of level "debug", which only the log that survives the run gets.

use core::fmt;

use raw_cpuid::{CpuId, CpuIdReaderNative};
use sld::Detection;
use vmx::capability::msr as vmx_msr;

use crate::firmware;
use crate::memory::Summary;
use crate::mtrr::Mtrrs;
use crate::x86::{cpu, msr};

/// IA32_BIOS_SIGN_ID: bits 63:32 the revision of the microcode, once CPUID leaf 1 was asked with 0 in it.
const MICROCODE: u32 = 0x8b;

/// The value of an MSR, or that it cannot be read.
struct Value(u32);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: only MSRs that are read without a side effect are asked for here.
        match unsafe { msr::read(self.0) } {
            Ok(value) => write!(f, "{value:#x}"),
            Err(_) => f.write_str("faults"),
        }
    }
}

/// The revision of the microcode: SDM volume 3, section "Determining the Signature".
fn microcode() -> Option<u32> {
    // SAFETY: writing 0 is the way to ask.
    unsafe {
        msr::write(MICROCODE, 0).ok()?;
        core::arch::x86_64::__cpuid(1);
        msr::read(MICROCODE).ok().map(|value| (value >> 32) as u32)
    }
}

/// Writes everything down.
pub fn report(memory: &Summary, mtrrs: Option<&Mtrrs>, apic_ids: &[u32]) {
    let cpuid = CpuId::with_cpuid_reader(CpuIdReaderNative);
    let brand = cpuid.get_processor_brand_string();
    let brand = brand.as_ref().map_or("unknown CPU", |brand| brand.as_str().trim());
    let vendor = cpuid.get_vendor_info();
    let vendor = vendor.as_ref().map_or("unknown vendor", |vendor| vendor.as_str());
    log::debug!("Unsplit {}, hardware report", env!("CARGO_PKG_VERSION"));
    if let Some(features) = cpuid.get_feature_info() {
        log::debug!(
            "CPU: {brand} ({vendor}), family {:#x} model {:#x} stepping {:#x}, microcode {}",
            features.family_id(),
            features.model_id(),
            features.stepping_id(),
            Hex(microcode())
        );
    }
    if let Some(hypervisor) = cpuid.get_hypervisor_info() {
        log::debug!("under a hypervisor: {:?}", hypervisor.identify());
    }
    log::debug!(
        "CPUID 7: {:x?}; announces IA32_CORE_CAPABILITIES: {}",
        core::arch::x86_64::__cpuid_count(7, 0),
        cpu::announces_core_capabilities()
    );
    for (name, number) in [
        ("IA32_FEATURE_CONTROL", vmx_msr::FEATURE_CONTROL),
        ("IA32_CORE_CAPABILITIES", sld::MSR_CORE_CAPABILITIES),
        ("IA32_ARCH_CAPABILITIES", 0x10a),
        ("IA32_APIC_BASE", 0x1b),
        ("IA32_MISC_ENABLE", 0x1a0),
        ("IA32_TSC_ADJUST", 0x3b),
        ("IA32_MCG_CAP", crate::machine_check::msr::CAPABILITIES),
    ] {
        log::debug!("{name} ({number:#x}): {}", Value(number));
    }
    for number in vmx_msr::BASIC..=0x493 {
        // SAFETY: capability MSRs have no side effect.
        if let Ok(value) = unsafe { msr::read(number) } {
            log::debug!("VMX capability {number:#x}: {value:#x}");
        }
    }
    match mtrrs {
        Some(mtrrs) => log::debug!("MTRRs: {mtrrs}"),
        None => log::debug!("MTRRs: none that can be read"),
    }
    log::debug!(
        "memory: {} MiB usable in a map of {} entries, up to {:#x}; left out: {} MiB that are not \
         write-back, {} MiB too far above",
        memory.usable >> 20,
        memory.regions,
        memory.top,
        memory.uncached >> 20,
        memory.beyond >> 20
    );
    log::debug!("APIC IDs of {} CPUs: {apic_ids:x?}", apic_ids.len());
}

/// What the probe of split-lock detection has found, and whether somebody hides it.
pub fn tell_detection(detection: Detection) {
    if detection == Detection::Absent {
        // SAFETY: reading it has no side effect.
        let capabilities = unsafe { msr::read(sld::MSR_CORE_CAPABILITIES) };
        let hidden = firmware::hidden_detection(cpu::announces_core_capabilities(), capabilities);
        if let Some(what) = hidden {
            log::warn!("{what}");
        }
    } else {
        // On no other CPU is even a look any of our business.
        log::debug!("MSR_TEST_CTRL (0x33): {}", Value(sld::MSR_TEST_CTRL));
    }
}

/// A number in hexadecimal, if there is one.
struct Hex(Option<u32>);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => write!(f, "{number:#x}"),
            None => f.write_str("unknown"),
        }
    }
}
