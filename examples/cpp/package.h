// A .pt2 of this project with libtorch alone: weights mapped once, shared by all entries, and the state.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// A loaded artifact with the state of one batch.
class Package {
 public:
    // Maps the weights and loads `prefill` and `decode`. Throws std::exception where it is no such file.
    explicit Package(const std::string& path);
    ~Package();

    // Feeds tokens, the same number for every row, behind those fed before.
    //   tokens: [batch][q_len], q_len >= 1, row by row.
    // Returns the most likely next token of each row.
    std::vector<int64_t> feed(const std::vector<int64_t>& tokens);

    // Forgets what was fed.
    void reset();

    // Rows that the artifact was compiled for.
    int64_t batch() const;

 private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};
