//! Two SMT siblings that really run at the same time, as two threads of this program.

use std::sync::RwLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

use super::hardware::BIT;
use crate::{
    Core, Cpu, Detection, Host, MsrFault, Policy, PreemptionDisabled, SldMode, Task, TestCtrl,
    ThisCpu, Vcpu, VmPolicy, Why, offline, online, step_begin, step_end, verify,
};

const ROUNDS: u32 = 20_000;

/// Both see the same MSR.
struct Sibling<'a> {
    msr: &'a AtomicU64,
    redundant: &'a AtomicU32,
}

impl TestCtrl for Sibling<'_> {
    /// Ice Lake client.
    fn cpuid(&mut self, leaf: u32, _: u32) -> [u32; 4] {
        if leaf == 0 { [1, 0x756E_6547, 0x6C65_746E, 0x4965_6E69] } else { [0x706E5, 0, 0, 0] }
    }

    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }

    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
        Ok(self.msr.load(Ordering::SeqCst))
    }

    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
        if self.msr.swap(value, Ordering::SeqCst) == value {
            self.redundant.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }
}

struct Guard<'a> {
    cpu: Cpu,
    core: &'a Core,
    hardware: Sibling<'a>,
}

impl<'a> PreemptionDisabled for Guard<'a> {
    type Hardware = Sibling<'a>;

    fn this_cpu(&mut self) -> ThisCpu<'_, Sibling<'a>> {
        ThisCpu { cpu: &mut self.cpu, core: self.core, hardware: &mut self.hardware }
    }
}

/// One sibling's life: its guest wants detection off while loaded; its host wants it on. Now and
/// then it steps. `guests` is held shared where a guest runs, alone where one steps.
fn run(id: u32, core: &Core, msr: &AtomicU64, redundant: &AtomicU32, guests: &RwLock<()>) -> u32 {
    let mut guard = Guard { cpu: Cpu::new(), core, hardware: Sibling { msr, redundant } };
    assert_eq!(online(&mut guard, SldMode::Warn).detection, Detection::Works);
    let host = Host { configured: Policy::Warn, enforced: SldMode::Warn };
    let mut vcpu = Vcpu::new(VmPolicy::new(host, None, true).unwrap());
    let mut task = Task::new(id);
    let mut lost = 0;
    for round in 0..ROUNDS {
        vcpu.load(&mut guard, &mut task).unwrap();
        verify(&mut guard, &task).unwrap();
        if round % 16 == 0 {
            let alone = guests.write().unwrap();
            let begun = step_begin(&mut guard).unwrap();
            assert!(begun.is_none_or(|real_bit| !real_bit.on && real_bit.why == Why::Step));
            // The sibling loads and puts meanwhile.
            for _ in 0..8 {
                assert_eq!(msr.load(Ordering::SeqCst) & BIT, 0, "split lock during a step");
                verify(&mut guard, &task).unwrap();
            }
            step_end(&mut guard).unwrap();
            drop(alone);
        }
        vcpu.put(&mut guard, &mut task).unwrap();
        verify(&mut guard, &task).unwrap();
        let guest = guests.read().unwrap();
        for _ in 0..8 {
            lost += u32::from(msr.load(Ordering::SeqCst) & BIT == 0);
        }
        drop(guest);
    }
    offline(&mut guard).unwrap();
    lost
}

#[test]
fn siblings_never_lose_detection_to_each_other() {
    let core = Core::new();
    let msr = AtomicU64::new(0);
    let redundant = AtomicU32::new(0);
    let guests = RwLock::new(());
    let lost: u32 = thread::scope(|scope| {
        let siblings = [0, 1].map(|id| {
            scope.spawn({
                let (core, msr, redundant, guests) = (&core, &msr, &redundant, &guests);
                move || run(id, core, msr, redundant, guests)
            })
        });
        siblings.map(|sibling| sibling.join().unwrap()).iter().sum()
    });
    assert_eq!(lost, 0, "detection was off while a task wanted it on");
    assert_eq!(redundant.into_inner(), 0, "WRMSR that changed nothing");
    assert_eq!(msr.into_inner(), 0, "boot value");
}
