//! Which CPUs are on the list, and probes that fail.

use std::vec::Vec;

use super::hardware::BIT;
use crate::{
    Core, Cpu, Detection, MsrFault, Online, PreemptionDisabled, ProbeFailure, RealBit, SldMode,
    TestCtrl, ThisCpu, Why, offline, online,
};

const INTEL: [u32; 3] = [0x756E_6547, 0x4965_6E69, 0x6C65_746E];
const AMD: [u32; 3] = [0x6874_7541, 0x6974_6E65, 0x444D_4163];

/// A CPU of which everything can be chosen.
#[derive(Clone)]
struct Hardware {
    vendor: [u32; 3],
    max_leaf: u32,
    signature: u32,
    leaf_7_edx: u32,
    /// `None`: faults.
    core_capabilities: Option<u64>,
    test_ctrl: u64,
    /// What becomes of a value that is written.
    keeps: fn(old: u64, new: u64) -> u64,
    writes: Vec<u64>,
    accesses: usize,
}

/// Arrow Lake, enumerating.
const ARROW_LAKE: Hardware = Hardware {
    vendor: INTEL,
    max_leaf: 0x23,
    signature: 0xC0662,
    leaf_7_edx: 1 << 30,
    core_capabilities: Some(1 << 5),
    test_ctrl: 0,
    keeps: |_, new| new,
    writes: Vec::new(),
    accesses: 0,
};

impl TestCtrl for Hardware {
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let [ebx, edx, ecx] = self.vendor;
        match (leaf, subleaf) {
            (0, _) => [self.max_leaf, ebx, ecx, edx],
            (1, _) => [self.signature, 0, 0, 0],
            // Leaves beyond the last one return the last one's data.
            (7, 0) | (8.., _) => [0, 0, 0, self.leaf_7_edx],
            _ => [0; 4],
        }
    }

    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
        assert!(self.leaf_7_edx & 1 << 30 != 0, "0xCF is not known to exist");
        self.core_capabilities.ok_or(MsrFault)
    }

    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
        self.accesses += 1;
        Ok(self.test_ctrl)
    }

    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
        self.accesses += 1;
        self.writes.push(value);
        self.test_ctrl = (self.keeps)(self.test_ctrl, value);
        Ok(())
    }
}

struct Guard<'a> {
    cpu: Cpu,
    core: &'a Core,
    hardware: Hardware,
}

impl PreemptionDisabled for Guard<'_> {
    type Hardware = Hardware;

    fn this_cpu(&mut self) -> ThisCpu<'_, Hardware> {
        ThisCpu { cpu: &mut self.cpu, core: self.core, hardware: &mut self.hardware }
    }
}

fn boot(core: &Core, hardware: Hardware) -> (Guard<'_>, Online) {
    let mut guard = Guard { cpu: Cpu::new(), core, hardware };
    let outcome = online(&mut guard, SldMode::Warn);
    (guard, outcome)
}

#[test]
fn only_listed_cpus_are_touched() {
    let enumerating = ARROW_LAKE;
    let not = Hardware { leaf_7_edx: 0, core_capabilities: None, ..ARROW_LAKE };
    let model = |signature| Hardware { signature, ..not.clone() };
    for (hardware, listed, what) in [
        (enumerating.clone(), true, "enumerated"),
        (not.clone(), false, "no 0xCF"),
        (Hardware { core_capabilities: Some(!(1 << 5)), ..ARROW_LAKE }, false, "0xCF bit 5 clear"),
        (Hardware { core_capabilities: None, ..ARROW_LAKE }, false, "0xCF faults"),
        (Hardware { max_leaf: 6, ..ARROW_LAKE }, false, "leaf 7 does not exist"),
        (model(0x606A6), true, "Ice Lake server"),
        (model(0x606C1), true, "Ice Lake D"),
        (model(0x706E5), true, "Ice Lake client"),
        (model(0x50654), false, "Skylake server"),
        (model(0x806C1), false, "Tiger Lake that does not enumerate"),
        (model(0x706F5), false, "family 7 is another family"),
        (model(0x007E5), false, "model 0x0E"),
        (Hardware { vendor: AMD, ..model(0x606A6) }, false, "not Intel"),
        (Hardware { vendor: AMD, ..enumerating }, false, "not Intel, same bit"),
    ] {
        let core = Core::new();
        let (guard, Online { detection, .. }) = boot(&core, hardware);
        assert_eq!(detection == Detection::Works, listed, "{what}");
        assert_eq!(guard.hardware.accesses > 0, listed, "{what}");
        assert_eq!(guard.cpu.mode() == SldMode::Warn, listed, "{what}");
    }
}

#[test]
fn a_bit_that_cannot_be_cleared_is_found() {
    let core = Core::new();
    let sticky = Hardware { keeps: |old, new| old | new, ..ARROW_LAKE };
    let (mut guard, Online { detection, real_bit }) = boot(&core, sticky);
    let failure = ProbeFailure::ReadBack { wrote: 0, read: BIT };
    assert_eq!(detection, Detection::Failed(failure));
    assert_eq!((real_bit, guard.cpu.mode()), (None, SldMode::Off));
    // One more try to leave it as found, then never again.
    assert_eq!(guard.hardware.writes, [BIT, 0, 0]);
    assert_eq!(offline(&mut guard), Ok(None));
    assert_eq!(guard.hardware.writes.len(), 3);
}

#[test]
fn platform_bits_that_do_not_stay_are_found_and_given_back() {
    let core = Core::new();
    // Bit 4 is lost when bit 29 is set.
    let fragile = Hardware {
        test_ctrl: 1 << 4,
        keeps: |_, new| if new & BIT != 0 { new & !(1 << 4) } else { new },
        ..ARROW_LAKE
    };
    let (guard, Online { detection, .. }) = boot(&core, fragile);
    let failure = ProbeFailure::ReadBack { wrote: BIT | 1 << 4, read: BIT };
    assert_eq!(detection, Detection::Failed(failure));
    assert_eq!(guard.hardware.test_ctrl, 1 << 4);
}

#[test]
fn threads_that_do_not_share_the_msr_are_found() {
    let core = Core::new();
    let (_first, outcome) = boot(&core, ARROW_LAKE);
    assert_eq!(outcome.real_bit, Some(RealBit { on: true, why: Why::Boot }));
    // The second has an MSR of its own, still as at boot.
    let (second, Online { detection, .. }) = boot(&core, ARROW_LAKE);
    assert_eq!(detection, Detection::Failed(ProbeFailure::NotShared(0)));
    assert_eq!(second.hardware.writes, []);
    assert_eq!(second.cpu.mode(), SldMode::Off);
}
