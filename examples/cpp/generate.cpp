// Greedy tokens behind a prompt of token ids, the same for all rows:
//
//   generate MODEL.pt2 NEW_TOKENS ID [ID ...]
#include <cstdlib>
#include <exception>
#include <iostream>
#include <vector>

#include "package.h"

int main(int argc, char** argv) {
    if (argc < 4) {
        std::cerr << "usage: generate MODEL.pt2 NEW_TOKENS ID [ID ...]\n";
        return 2;
    }
    try {
        Package package(argv[1]);
        std::vector<int64_t> tokens;
        for (int64_t row = 0; row < package.batch(); ++row)
            for (int i = 3; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
        for (int i = 0; i < std::atoi(argv[2]); ++i) {
            tokens = package.feed(tokens);
            std::cout << (i ? " " : "") << tokens.front();
        }
        std::cout << "\n";
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
    return 0;
}
