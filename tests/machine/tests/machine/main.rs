//! All whole-machine tests.

use std::process::ExitCode;

use libtest_mimic::Arguments;

mod bench;
mod console;
mod firmware;
mod guests;
mod hardware;
mod hostile;
mod inputs;
mod links;
mod machines;
mod offenders;
mod operations;
mod policies;
mod refusals;
mod sharing;
mod shim;
mod smp;
mod stepping;
mod trace;
mod vcpu;
mod verdicts;
mod vms;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let parts = [
        shim::trials(),
        machines::trials(),
        links::trials(),
        firmware::trials(),
        refusals::trials(),
        hardware::trials(),
        inputs::trials(),
        guests::trials(),
        verdicts::trials(),
        sharing::trials(),
        hostile::trials(),
        vcpu::trials(),
        smp::trials(),
        policies::trials(),
        stepping::trials(),
        trace::trials(),
        console::trials(),
        offenders::trials(),
        bench::trials(),
    ];
    let trials = parts.into_iter().flatten().collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
