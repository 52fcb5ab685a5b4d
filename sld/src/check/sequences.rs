//! Random long sequences in systems too large to exhaust: four CPUs on one, two or four cores,
//! four vCPUs.

use std::vec::Vec;

use proptest::collection::vec;
use proptest::prelude::*;

use super::hardware::Kind;
use super::system::{Config, System, Vm, policies_from, sees_all};
use crate::{Policy, SldMode};

const CPUS: usize = 4;
const VCPUS: usize = 4;

fn config() -> impl Strategy<Value = Config<CPUS, VCPUS>> {
    let mode = prop_oneof![Just(SldMode::Off), Just(SldMode::Fatal), Just(SldMode::Warn)];
    let core_of = prop_oneof![Just([0, 1, 2, 3]), Just([0, 0, 1, 1]), Just([0, 0, 0, 0])];
    // Mostly hosts as one buys them.
    let kinds = prop_oneof![
        6 => Just([Kind::Enumerated; CPUS]),
        1 => Just([Kind::IceLake; CPUS]),
        1 => Just([Kind::Enumerated, Kind::Stuck, Kind::ReadOnly, Kind::Absent]),
        1 => Just([Kind::Hidden; CPUS]),
    ];
    let vms = vec((0..6_usize, any::<bool>(), any::<bool>()), VCPUS);
    (mode, core_of, kinds, any::<bool>(), vms).prop_map(|(mode, core_of, kinds, boot_on, vms)| {
        let vm = |(index, expose, flagged)| {
            let first = match mode {
                SldMode::Off => Policy::Off,
                SldMode::Warn => policies_from(Policy::Off)[index],
                SldMode::Fatal => policies_from(Policy::Emulate)[index / 3 * 2],
            };
            let flagged = flagged && mode == SldMode::Warn && (expose || sees_all(first));
            Vm { policies: policies_from(first), expose, flagged }
        };
        let vms: Vec<Vm> = vms.into_iter().map(vm).collect();
        Config { mode, core_of, kinds, boot_on, vms: vms.try_into().unwrap(), writes_fault: false }
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1024,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Besides the invariants: were the MSR to fault now, nothing would be half done.
    #[test]
    fn long_sequences_keep_the_invariants(
        config in config(),
        choices in vec(any::<u16>(), 1..2000),
    ) {
        let mut system = System::new(&config);
        for choice in choices {
            let enabled = system.enabled(&config);
            let op = enabled[usize::from(choice) % enabled.len()];
            for step in [
                system.step_with_fault(&config, op),
                system.step(&config, op).map(|next| system = next),
                system.check_state(&config),
            ] {
                prop_assert!(step.is_ok(), "{op:?}: {:?}", step.unwrap_err());
            }
        }
    }
}
