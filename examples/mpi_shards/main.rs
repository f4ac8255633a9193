fn main() { let u = mpi::initialize(); println!("{}", u.is_some()); }
